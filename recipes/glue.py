"""From a float encoder to a packed 1-bit one on a GLUE task, the embedded demo or files of your own.

    python recipes/glue.py                                                      # the demo: a minute, no downloads
    accelerate launch recipes/glue.py --task sst2                               # BERT-base, data from the Hub
    accelerate launch recipes/glue.py --task rte --data_dir glue --model_name_or_path FOLDER
    python recipes/glue.py --train_file train.csv --validation_file dev.csv

Stages: fine-tune the float teacher, binarize a copy of it and distil the teacher into it, pack it into bits, reload the
packed folder and evaluate that, with `--lora` train an adapter on it, write `results.json`, a model card and plots of
oscillation and weights. Interrupted, the same command continues where it stopped; stages that are complete are not
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from augmentation import check_augmentation, student_tokens
from glue_arguments import parse_glue_arguments
from glue_files import describe
from glue_grammar import demo_model_config
from glue_job import GlueJob
from recipe_arguments import Distillation
from recipe_job import Job, Logits, load_pretrained, parts, prepare
from recipe_report import is_reported, print_summary, write_report
from recipe_task import Task
from recipe_training import (
    DIVERGED,
    DistillationTrainer,
    FineTuningTrainer,
    Trained,
    device_arguments,
    silence,
    train,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments
from rebnn_hf.checkpoints import STATE_FILE, written_aside
from rebnn_hf.kernels import use_backend

NOT_PACKED = "ties='released' has sign(0) = 0, a third value that does not fit into a bit."


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    job = prepare(parse_glue_arguments(argv), GlueJob)
    if job.task.name == "custom":
        job.process.print(describe(job.task))
    check_augmentation(job)
    run_stages(job)


def run_stages(job: Job) -> None:
    """Runs what is left to do of a job of any kind."""
    check_architecture(job)
    with unfinished_explained(job):
        job.stage("teacher", fine_tune_teacher)
        for stage in job.arguments.distillations():
            job.stage(stage.name, partial(distil_student, stage=stage))
        job.stage("packed", pack_student)
        if job.arguments.adapter.lora is not None:
            job.stage("adapter", train_adapter)
        report(job)
    PartialState().destroy_process_group()


@contextmanager
def unfinished_explained(job: Job) -> Iterator[None]:
    """Says in a sentence what stopped a run and how it goes on, where disk or file system refuse to take part.

    Raises:
        SystemExit: For an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{job.run.root} is unfinished: {error}. Mend that, then the same command goes on.") from error


def check_architecture(job: Job) -> None:
    """Refuses a model that cannot be binarized before the teacher is trained, not after.

    Raises:
        SystemExit: With what binarize() says.
    """
    source = job.arguments.teacher.source
    if source is None:  # the demo's own
        return
    config = load_pretrained(AutoConfig.from_pretrained, source)
    try:
        with torch.device("meta"):
            model = job.auto_model.from_config(config)
        for stage in job.arguments.distillations():
            rebnn_hf.selected_modules(model, job.arguments.binary.config(stage.preset))
    except ValueError as error:
        options = "Fields are options of the same name: --attention softmax"
        raise SystemExit(f"{source} cannot be binarized as asked: {error} ({options})") from None


# Stage 1: the teacher


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
    trainer = FineTuningTrainer(model=build_teacher(job), args=arguments, **trainer_inputs(job))
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


def build_teacher(job: Job) -> PreTrainedModel:
    """The pretrained encoder with a new head; for the demo a small one from scratch."""
    source = job.arguments.teacher.model_name_or_path
    if source is None:
        return AutoModelForSequenceClassification.from_config(demo_model_config(len(job.tokenizer)))
    names = dict(enumerate(job.task.labels)) if job.task.labels else {}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}
    return job.load(source, num_labels=job.task.num_labels, **labels)


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


# Stage 2: binarize and distil


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
    """The model of the stage before, or the fine-tuned teacher, in few bits and with the student's dropout.

    Its float embeddings stay the teacher's.
    """
    source = job.teacher_folder if stage.previous is None else job.run.folder(stage.previous)
    model = job.load(source, config=with_dropout(source, job.arguments.student.dropout))
    method = job.arguments.binary.config(stage.preset)
    if stage.previous is None:
        student = rebnn_hf.binarize(model, method)
    else:
        student = rebnn_hf.rebinarize(
            model,
            method,
            carry_weight_scales=job.arguments.student.stage_weight_scales == "carry",
            carry_activation_scales=job.arguments.student.stage_activation_scales == "carry",
        )
    for module in student.modules():
        if type(module) is nn.Embedding:
            module.weight.requires_grad_(job.arguments.student.train_embeddings)
    return student


def with_dropout(source: str | Path, dropout: float) -> PretrainedConfig:
    """Config of a saved model with another dropout."""
    config = AutoConfig.from_pretrained(source)
    for name, value in config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):  # each architecture has its own names for it
            setattr(config, name, dropout)
    return config


# Stage 3: pack, reload, evaluate


def pack_student(job: Job) -> dict[str, Any]:
    """Packs the student, reloads it as a user would, and compares the two."""
    folder, dtype = job.run.folder("packed"), job.arguments.packed_dtype()
    student = job.load(job.run.folder("latent"))
    if student.config.quantization_config.ties == "released":
        return score_unpacked(job, student)
    with use_backend("reference"):  # the engine rounds elsewhere, which few-bit activations may turn into other codes
        latent_logits = job.validate(student)
        check_equal(latent_logits, job.validate(rebnn_hf.pack(student)), torch.float32)
    save(job, rebnn_hf.pack(student, dtype), "packed")
    packed = job.auto_model.from_pretrained(folder)
    packed_logits = job.validate(packed)
    if student.config.quantization_config.activation == "none":
        check_equal(latent_logits, packed_logits, dtype)
    elif dtype == torch.float32:
        with use_backend("reference"):
            check_equal(latent_logits, job.validate(packed), dtype)
    job.submit(packed, packed_logits)
    return {
        "scores": {**teacher_scores(job), "latent": job.score(latent_logits), "packed": job.score(packed_logits)},
        "max_logit_difference": largest_difference(latent_logits, packed_logits),
        "size": rebnn_hf.summary(packed).totals,
    }


def score_unpacked(job: Job, student: PreTrainedModel) -> dict[str, Any]:
    """Scores the latent model, whose signs have three values and fit into no bits: to compare it with what others did.

    The released codes report such models too.
    """
    logits = job.validate(student)
    job.submit(student, logits)
    return {"scores": {**teacher_scores(job), "latent": job.score(logits)}, "not_packed": NOT_PACKED}


def teacher_scores(job: Job) -> dict[str, dict[str, float]]:
    """New scores of the teacher where its own stage scored it by other options; nothing where those are good."""
    if job.run.record("teacher").get("scoring", {}) == job.arguments.data.scoring():
        return {}
    return {"teacher": job.score(job.validate(job.load(job.teacher_folder)))}


def largest_difference(latent: Logits, packed: Logits) -> float:
    """Largest difference between the logits of two models."""
    return max(float(np.abs(latent[name] - packed[name]).max()) for name in latent)


def check_equal(latent: Logits, packed: Logits, dtype: torch.dtype) -> None:
    """Refuses a packed model whose logits differ from the latent one's.

    Raises:
        RuntimeError: If it is by more than rounding in `dtype` can explain.
    """
    difference = largest_difference(latent, packed)
    largest = max(float(np.abs(logits).max()) for logits in latent.values())
    if not difference <= math.sqrt(torch.finfo(dtype).eps) * max(1.0, largest):
        raise RuntimeError(
            f"the packed model does not answer like the trained one: logits of up to {largest:.3g} differ by "
            f"{difference:.3g}, which is more than rounding in {dtype}. Nothing is reported."
        )


# Stage 4: an adapter on the packed model


def train_adapter(job: Job) -> dict[str, Any]:
    """Trains a LoRA adapter beside the bits, reloads both as a user would, and scores them together."""
    from recipe_adapter import add_adapter, count_parameters, load_adapter  # the only stage that needs PEFT

    options, folder = job.arguments.adapter, job.run.folder("adapter")
    packed = job.run.folder("packed")

    def build() -> PreTrainedModel:
        return add_adapter(job.load(packed), options.lora, job.adapter_task)

    rates = {"learning_rate": options.lora_learning_rate, "num_train_epochs": options.lora_epochs}
    trained, record = distil(job, "adapter", job.arguments.distillations()[-1], build, **rates)
    save(job, load_adapter(job.load(packed), trained.checkpoint), "adapter")
    adapted = load_adapter(job.auto_model.from_pretrained(packed), folder)
    return {
        **record,
        **trained_record([trained]),
        "scores": job.score(job.validate(adapted)),
        "rank": options.lora,
        "parameters": count_parameters(folder),
    }


# Stage 5: the report


def report(job: Job) -> None:
    """Writes and prints the results, unless a finished run left them."""
    if job.process.is_main_process:
        if not is_reported(job):
            write_report(job)
        print_summary(job.run.results())
    job.process.wait_for_everyone()


# What the stages have in common


def training_arguments(
    kind: Callable[..., TrainingArguments], job: Job, stage: str, **specific: Any
) -> TrainingArguments:
    """The arguments that teacher and student share, and the `specific` ones of a stage."""
    return kind(
        output_dir=str(job.run.folder(stage)),
        per_device_train_batch_size=job.arguments.student.batch_size // parts(job.arguments, job.process),
        warmup_steps=job.arguments.student.warm_up,
        lr_scheduler_type="linear",
        save_total_limit=1,
        logging_first_step=True,
        disable_tqdm=False,
        **job.arguments.run.training(),
        **device_arguments(),
        **specific,
    )


def trainer_inputs(job: Job) -> dict[str, Any]:
    """What both Trainers train on."""
    return {"train_dataset": job.tokens["train"], "data_collator": DataCollatorWithPadding(job.tokenizer)}


def train_logged(job: Job, trainer: Trainer, name: str) -> Trained:
    """Trains in the folder of that name and leaves the training log there."""
    silence(trainer)
    folder = job.run.folder(name)
    trained = train(trainer, folder)
    if job.process.is_main_process:
        trained.state.save_to_json(str(folder / STATE_FILE))
    return trained


def save(job: Job, model: PreTrainedModel, stage: str) -> None:
    """Leaves the model, with its tokenizer if it has one, in the stage's folder: each file whole or not there.

    Raises:
        SystemExit: If the training that made it diverged.
    """
    check_finite(model, stage)
    if job.process.is_main_process:
        with written_aside(job.run.folder(stage)) as draft:
            model.save_pretrained(draft)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(draft)
    job.process.wait_for_everyone()


def check_finite(model: PreTrainedModel, stage: str) -> None:
    """Refuses a model with weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SystemExit(f"{stage}: {name} holds NaN or infinity. {DIVERGED}")


def trained_record(runs: Sequence[Trained]) -> dict[str, Any]:
    """What a stage records of its trainings."""
    return {
        "steps": sum(run.state.global_step for run in runs),
        "earlier_seconds": sum(run.earlier_seconds for run in runs),
    }


if __name__ == "__main__":
    main()
