"""The stages that distil the teacher into a 1-bit student, each from the one before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from augmentation import student_tokens
from recipe_arguments import Distillation
from recipe_job import Job, with_dropout
from recipe_start import continued
from recipe_training import (
    DistillationTrainer,
    Trained,
    save,
    train_logged,
    trained_record,
    trainer_inputs,
    training_arguments,
)
from torch import nn
from transformers import PreTrainedModel, set_seed

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments


def distil_student(job: Job, stage: Distillation) -> dict[str, Any]:
    """Binarizes a copy of the teacher, or the student of the stage before, and trains it to answer like its teacher."""
    trained, record = distil(job, stage.name, stage, partial(build_student, job, stage), **student_rates(job))
    save(job, job.auto_model.from_pretrained(trained.checkpoint), stage.name)
    return record | trained_record([trained])


def distil(
    job: Job, name: str, stage: Distillation, build: Callable[[], PreTrainedModel], **rates: float
) -> tuple[Trained, dict[str, Any]]:
    """Trains what `build` makes with the losses and the teacher of a stage, in the folder of that name.

    Returns:
        The training, and what to record about the data.
    """
    arguments = student_arguments(job, stage, name, **rates)
    train_dataset, record = student_tokens(job)
    inputs = trainer_inputs(job) | {"train_dataset": train_dataset}
    set_seed(job.arguments.run.seed)
    model = build()
    trainer = DistillationTrainer(model=model, teacher=load_teacher(job, stage), args=arguments, **inputs)
    return train_logged(job, trainer, name), record


def student_arguments(job: Job, stage: Distillation, name: str, **specific: Any) -> ReBNNTrainingArguments:
    """The arguments of a distillation in the folder of that name; `specific` ones have the last word."""
    chosen = {
        "max_steps": job.arguments.student.max_steps,
        "seed": job.arguments.run.seed,
        "log_oscillation": "layer",
        "plot_oscillation": False,  # the report draws it, also after an interruption
        **job.arguments.losses(),
        **specific,
    }
    kind = partial(ReBNNTrainingArguments.preset, stage.preset) if stage.preset else ReBNNTrainingArguments
    return training_arguments(kind, job, name, **chosen)


def student_rates(job: Job) -> dict[str, float]:
    """How fast and how long the student learns."""
    options = job.arguments.student
    return {"learning_rate": options.learning_rate, "num_train_epochs": options.epochs}


def load_teacher(job: Job, stage: Distillation) -> PreTrainedModel:
    """The float teacher or, where that is asked for, the student of the stage before."""
    from_previous = stage.previous is not None and job.arguments.student.stage_teacher == "previous"
    return job.load(job.run.folder(stage.previous) if from_previous else job.teacher_folder)


def build_student(job: Job, stage: Distillation) -> PreTrainedModel:
    """The model of the stage before, that of --student, or the fine-tuned teacher, in few bits, with its own dropout.

    Its float embeddings stay those it starts with.
    """
    options, method = job.arguments.student, job.arguments.binary.config(stage.preset)
    source = job.teacher_folder if stage.previous is None else job.run.folder(stage.previous)
    model = job.load(source, config=with_dropout(source, options.dropout))
    if stage.previous is not None:
        student = rebnn_hf.rebinarize(
            model,
            method,
            carry_weight_scales=options.stage_weight_scales == "carry",
            carry_activation_scales=options.stage_activation_scales == "carry",
        )
    elif options.student is not None:
        student = continued(job, options.student, model, method)
    else:
        student = rebnn_hf.binarize(model, method)
    for module in student.modules():
        if type(module) is nn.Embedding:
            module.weight.requires_grad_(options.train_embeddings)
    return student
