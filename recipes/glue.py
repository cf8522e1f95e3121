"""From a float encoder to a packed 1-bit one on a GLUE task, the embedded demo or files of your own.

    python recipes/glue.py                                                      # the demo: a minute, no downloads
    accelerate launch recipes/glue.py --task sst2                               # BERT-base, data from the Hub
    accelerate launch recipes/glue.py --task rte --data_dir glue --model_name_or_path FOLDER
    python recipes/glue.py --train_file train.csv --validation_file dev.csv

Stages: fine-tune the float teacher, binarize a copy of it and distil the teacher into it, pack it into bits, reload the
packed folder and evaluate that, write `results.json`, a model card and a plot of the weight oscillation. Interrupted,
the same command continues where it stopped; stages that are complete are not repeated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from glue_arguments import parse_arguments
from glue_augmentation import check_augmentation, student_tokens
from glue_grammar import demo_model_config
from glue_job import Job, load_pretrained, prepare
from glue_report import print_summary, write_report
from glue_scores import compute_metrics, predictions_of, submission_name, write_submission
from glue_tasks import GlueTask
from glue_training import (
    STATE_FILE,
    DistillationTrainer,
    FineTuningTrainer,
    device_arguments,
    predict,
    silence,
    train,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments


def main(argv: list[str] | None = None) -> None:
    """Runs the stages."""
    job = prepare(parse_arguments(argv))
    check_augmentation(job)
    job.stage("teacher", fine_tune_teacher)
    job.stage("latent", distil_student)
    job.stage("packed", pack_student)
    report(job)
    PartialState().destroy_process_group()


# Stage 1: the teacher


def fine_tune_teacher(job: Job) -> dict[str, Any]:
    """Fine-tunes the float model, unless --teacher brings one, and scores it."""
    record: dict[str, Any] = {}
    if job.arguments.teacher.teacher is None:
        options = job.arguments.teacher
        arguments = training_arguments(
            TrainingArguments,
            job,
            "teacher",
            learning_rate=options.teacher_learning_rate,
            num_train_epochs=options.teacher_epochs,
        )
        set_seed(job.arguments.run.seed)
        trainer = FineTuningTrainer(model=build_teacher(job), args=arguments, **trainer_inputs(job))
        record |= train_and_save(job, trainer, "teacher")
    teacher = load_float(job.teacher_folder)
    check_labels(teacher, job.task)
    record["scores"] = score(job, validate(job, teacher))
    return record


def build_teacher(job: Job) -> PreTrainedModel:
    """The pretrained encoder with a new head; for the demo a small one from scratch."""
    source = job.arguments.teacher.model_name_or_path
    if source is None:
        return AutoModelForSequenceClassification.from_config(demo_model_config(len(job.tokenizer)))
    names = dict(enumerate(job.task.labels)) if job.task.labels else {}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}
    return load_float(source, num_labels=job.task.num_labels, **labels)


def check_labels(teacher: PreTrainedModel, task: GlueTask) -> None:
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


# Stage 2: binarize and distil


def distil_student(job: Job) -> dict[str, Any]:
    """Binarizes a copy of the teacher and trains it to answer like the teacher."""
    options = job.arguments.student
    arguments = training_arguments(
        ReBNNTrainingArguments,
        job,
        "latent",
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        log_oscillation="layer",
        plot_oscillation=False,  # the report draws it, also after an interruption
        **job.arguments.losses(),
    )
    train_dataset, record = student_tokens(job)
    inputs = trainer_inputs(job) | {"train_dataset": train_dataset}
    set_seed(job.arguments.run.seed)
    trainer = DistillationTrainer(
        model=build_student(job), teacher=load_float(job.teacher_folder), args=arguments, **inputs
    )
    return record | train_and_save(job, trainer, "latent")


def build_student(job: Job) -> PreTrainedModel:
    """The fine-tuned teacher with 1-bit weights and the student's dropout; its float embeddings stay the teacher's."""
    config = AutoConfig.from_pretrained(job.teacher_folder)
    for name, value in config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):  # each architecture has its own names for it
            setattr(config, name, job.arguments.student.dropout)
    student = rebnn_hf.binarize(load_float(job.teacher_folder, config=config), job.arguments.binary.config())
    for module in student.modules():
        if type(module) is nn.Embedding:
            module.weight.requires_grad_(job.arguments.student.train_embeddings)
    return student


# Stage 3: pack, reload, evaluate


def pack_student(job: Job) -> dict[str, Any]:
    """Packs the student, reloads it as a user would, and compares the two."""
    folder, dtype = job.run.folder("packed"), job.arguments.packed_dtype()
    latent = load_float(job.run.folder("latent"))
    latent_logits = validate(job, latent)
    if job.process.is_main_process:
        rebnn_hf.pack(latent, dtype).save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
    job.process.wait_for_everyone()
    packed = AutoModelForSequenceClassification.from_pretrained(folder)
    packed_logits = validate(job, packed)
    difference = check_equal(latent_logits, packed_logits, dtype)
    submit(job, packed)
    summary = rebnn_hf.summary(packed)
    return {
        "scores": {"latent": score(job, latent_logits), "packed": score(job, packed_logits)},
        "max_logit_difference": difference,
        "size": summary.totals,
        "layers": str(summary),
    }


def check_equal(latent: dict[str, np.ndarray], packed: dict[str, np.ndarray], dtype: torch.dtype) -> float:
    """Largest difference between the logits of the latent and of the reloaded packed model.

    Raises:
        RuntimeError: If it is more than rounding in `dtype` can explain.
    """
    difference = max(float(np.abs(latent[name] - packed[name]).max()) for name in latent)
    largest = max(float(np.abs(logits).max()) for logits in latent.values())
    if not difference <= math.sqrt(torch.finfo(dtype).eps) * max(1.0, largest):
        raise RuntimeError(
            f"the packed model does not answer like the trained one: logits of up to {largest:.3g} differ by "
            f"{difference:.3g}, which is more than rounding in {dtype}. Nothing is reported."
        )
    return difference


def submit(job: Job, model: PreTrainedModel) -> None:
    """Writes the predictions for the test splits in the form GLUE takes."""
    for name, split in job.splits("test").items():
        logits = predict(model, split, job.tokenizer, job.run.root)
        if job.process.is_main_process:
            path = job.run.root / "predictions" / submission_name(job.task, name)
            path.parent.mkdir(exist_ok=True)
            write_submission(path, job.task, split["index"], predictions_of(job.task, logits))


# Stage 4: the report


def report(job: Job) -> None:
    """Writes and prints the results, unless a finished run left them."""
    if job.process.is_main_process:
        if job.run.results() is None:
            write_report(job)
        print_summary(job.run.results())
    job.process.wait_for_everyone()


# What the stages have in common


def training_arguments(kind: type[TrainingArguments], job: Job, stage: str, **specific: Any) -> TrainingArguments:
    """The arguments that teacher and student share, and the `specific` ones of a stage."""
    run = job.arguments.run
    return kind(
        output_dir=str(job.run.folder(stage)),
        per_device_train_batch_size=job.arguments.student.batch_size // job.process.num_processes,
        warmup_steps=job.arguments.student.warm_up,
        lr_scheduler_type="linear",
        save_steps=run.save_steps,
        save_total_limit=1,
        logging_steps=run.logging_steps,
        logging_first_step=True,
        report_to=run.report_to,
        disable_tqdm=False,
        seed=run.seed,
        bf16=run.bf16,
        **device_arguments(),
        **specific,
    )


def trainer_inputs(job: Job) -> dict[str, Any]:
    """What both Trainers train on."""
    return {"train_dataset": job.tokens["train"], "data_collator": DataCollatorWithPadding(job.tokenizer)}


def train_and_save(job: Job, trainer: Trainer, stage: str) -> dict[str, Any]:
    """Trains, leaves model, tokenizer and training log in the stage's folder, and returns what to record."""
    silence(trainer)
    folder = job.run.folder(stage)
    trained = train(trainer, folder)
    if job.process.is_main_process:
        AutoModelForSequenceClassification.from_pretrained(trained.checkpoint).save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        trained.state.save_to_json(str(folder / STATE_FILE))
    job.process.wait_for_everyone()
    return {"steps": trained.state.global_step, "earlier_seconds": trained.earlier_seconds}


def validate(job: Job, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The logits of `model` on every validation split."""
    splits = job.splits("validation")
    return {name: predict(model, split, job.tokenizer, job.run.root) for name, split in splits.items()}


def score(job: Job, logits: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of the task, for MNLI's second split with `_mismatched` at the end of their names."""
    if not job.process.is_main_process:
        return {}  # what is recorded is what the main process records
    compute = compute_metrics(job.task)
    scores = {}
    for name, values in logits.items():
        labels = np.asarray(job.tokens[name]["labels"])
        for metric, value in compute(EvalPrediction(values, labels)).items():
            scores[metric + name.removeprefix("validation")] = float(value)
    return scores


def load_float(source: str | Path, **options: Any) -> PreTrainedModel:
    """A classifier in float32, whatever dtype its file has: it is going to be trained or compared."""
    options = {"dtype": torch.float32, **options}
    if device_arguments()["use_cpu"]:
        # The backward pass of torch's fused attention dominates a training step with short sentences on a CPU;
        # written out it takes next to nothing.
        options["attn_implementation"] = "eager"
    return load_pretrained(AutoModelForSequenceClassification.from_pretrained, source, **options)


if __name__ == "__main__":
    main()
