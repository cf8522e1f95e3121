"""The first stage of a recipe of texts: the float teacher, given or fine-tuned, on its own or averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from recipe_job import Job
from recipe_task import Task
from recipe_training import (
    FineTuningTrainer,
    Trained,
    save,
    train_logged,
    trained_record,
    trainer_inputs,
    training_arguments,
)
from transformers import PreTrainedModel, TrainingArguments, set_seed


def fine_tune_teacher(job: Job) -> dict[str, Any]:
    """Fine-tunes the float model, unless --teacher brings one, and scores it."""
    record: dict[str, Any] = {}
    if job.arguments.teacher.teacher is None:
        runs = [fine_tune(job, number) for number in range(job.arguments.teacher.teacher_runs)]
        save(job, averaged(job, runs), "teacher")
        record |= trained_record(runs)
        if len(runs) > 1:
            record["run_scores"] = [job.score(job.validate(job.load(run.checkpoint))) for run in runs]
    teacher, loading = job.load(job.teacher_folder, output_loading_info=True)
    check_head(loading["missing_keys"], job.task)
    check_labels(teacher, job.task)
    return record | {"scores": job.score(job.validate(teacher)), "scoring": job.arguments.data.scoring()}


def fine_tune(job: Job, number: int) -> Trained:
    """One of the fine-tunings of the teacher, counted from 0.

    All start from the same weights, those of the new head included; what differs is the order of the data and dropout.
    """
    options, seed = job.arguments.teacher, job.arguments.run.seed
    name = "teacher"
    if options.teacher_runs > 1:
        name = f"teacher/run-{number + 1}"
        job.process.print(f"teacher: fine-tuning {number + 1} of {options.teacher_runs}")
    arguments = training_arguments(
        TrainingArguments,
        job,
        name,
        learning_rate=options.teacher_learning_rate,
        num_train_epochs=options.teacher_epochs,
        seed=seed + number,
    )
    set_seed(seed)
    trainer = FineTuningTrainer(model=job.new_teacher(), args=arguments, **trainer_inputs(job))
    return train_logged(job, trainer, name)


def averaged(job: Job, runs: Sequence[Trained]) -> PreTrainedModel:
    """The model that trainings from one start average to: a model soup (Wortsman et al. 2022, arXiv 2203.05482)."""
    model, *others = (job.auto_model.from_pretrained(run.checkpoint) for run in runs)
    model.load_state_dict(mean_weights([one.state_dict() for one in (model, *others)]))
    return model


def mean_weights(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean of each floating-point tensor, taken in float64; the others are those of the first state."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def check_head(missing: Iterable[str], task: Task) -> None:
    """Refuses a teacher without the weights of a head for the task: they would be random."""
    if missing:
        raise SystemExit(
            f"--teacher has no weights {', '.join(sorted(missing))}, but {task.name} needs them: "
            "pass a model fine-tuned on this task."
        )


def check_labels(teacher: PreTrainedModel, task: Task) -> None:
    """Refuses a teacher whose outputs mean something else than the labels of the task."""
    if teacher.config.num_labels != task.num_labels:
        raise SystemExit(
            f"--teacher has {teacher.config.num_labels} outputs, but {task.name} needs {task.num_labels}: "
            "pass a model fine-tuned on this task."
        )
    names = [teacher.config.id2label[i].lower() for i in range(task.num_labels)]
    wanted = [name.lower() for name in task.labels or names]
    if sorted(names) == sorted(wanted) and names != wanted:
        raise SystemExit(
            f"--teacher has the labels {names} where {task.name} has {wanted}: their order must be the same."
        )
