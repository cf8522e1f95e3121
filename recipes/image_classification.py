"""From nothing to a packed 1-bit image classifier, with timm's models: digits, a folder of images or a Hub data set.

    python recipes/image_classification.py                                      # the digits of scikit-learn: minutes
    accelerate launch recipes/image_classification.py --data_dir imagenet --teacher timm/resnet34.a1_in1k
    accelerate launch recipes/image_classification.py --dataset ethz/food101 --model rebnn_reactnet_a

Stages: train the float teacher; distil it into a student with 1-bit activations (stage one of ReActNet and ReBNN), then
into one whose weights are 1-bit too; pack that into bits, reload the packed folder and evaluate it, write
`results.json`, a model card and plots: oscillation, flip ratios of each layer by epochs, latent weights. Interrupted,
the same command continues where it stopped; stages that are complete are not repeated.

The defaults for images other than the digits are those of the paper, but for the noise along the principal components
of colour (AlexNet's, of strength 0.1) that the released code adds to training images: timm has no such transform.
With --ema the last stage leaves, and packs, a moving average of its latent weights, scales and BatchNorm statistics.
Bits are the signs of averaged weights, not averages of bits: a combination of signs that no step had, under statistics
that were measured with others. So compare the score with that of a run without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate import PartialState
from image_arguments import parse_image_arguments
from image_job import ImageJob
from image_training import StageOneTrainer, StageTwoTrainer, TeacherTrainer, load_average
from recipe_job import prepare
from recipe_packing import pack_student
from recipe_report import report
from recipe_teacher import check_head, check_labels
from recipe_training import save, train_logged, trained_record, training_arguments
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments
from rebnn_hf.vision import load_stage_one


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    run_stages(prepare(parse_image_arguments(argv), ImageJob))


def run_stages(job: ImageJob) -> None:
    """Runs what is left to do."""
    check_models(job)
    job.stage("teacher", train_teacher)
    job.stage("stage-1", distil_stage_one)
    job.stage("latent", distil_stage_two)
    job.stage("packed", pack_student)
    report(job)
    PartialState().destroy_process_group()


def check_models(job: ImageJob) -> None:
    """Refuses models that cannot be made before anything is trained.

    Raises:
        SystemExit: In one sentence.
    """
    binary_student(job)
    if job.arguments.teacher.teacher is None and job.run.record("teacher") is None:
        new_teacher(job)


# The teacher


def train_teacher(job: ImageJob) -> dict[str, Any]:
    """Trains the float model, unless --teacher brings one, and scores it."""
    record = fit_teacher(job) if job.arguments.teacher.teacher is None else {}
    teacher, loading = job.load(job.teacher_folder, output_loading_info=True)
    check_head(loading["missing_keys"], job.task)
    check_labels(teacher, job.task)
    return record | {"scores": job.score(job.validate(teacher)), "scoring": job.arguments.data.scoring()}


def fit_teacher(job: ImageJob) -> dict[str, Any]:
    """Trains the float model on the labels."""
    options = job.arguments.teacher
    arguments = image_arguments(
        TrainingArguments,
        job,
        "teacher",
        learning_rate=options.teacher_learning_rate,
        num_train_epochs=options.teacher_epochs,
    )
    set_seed(job.arguments.run.seed)
    trainer = TeacherTrainer(model=new_teacher(job), args=arguments, **job.trainer_inputs())
    return trained(job, trainer, "teacher")


def new_teacher(job: ImageJob) -> PreTrainedModel:
    """The pretrained model with a new head, or an architecture of timm with first weights."""
    options = job.arguments.teacher
    if options.pretrained is None:
        return job.new_model(options.teacher_model)
    names = dict(enumerate(job.task.labels))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    teacher = job.load(options.pretrained, ignore_mismatched_sizes=True, **labels)
    teacher.config.pretrained_cfg = job.data_config
    return teacher


# The student


def distil_stage_one(job: ImageJob) -> dict[str, Any]:
    """Trains the student with 1-bit activations and float weights to answer like the teacher, and scores it."""
    options = job.arguments.student
    arguments = image_arguments(
        TrainingArguments,
        job,
        "stage-1",
        learning_rate=options.stage_one_learning_rate,
        num_train_epochs=options.stage_one_epochs,
        max_steps=options.max_steps,
        weight_decay=options.stage_one_weight_decay,
    )
    set_seed(job.arguments.run.seed)
    student = job.new_student(binary_weights=False)
    trainer = StageOneTrainer(
        model=student, teacher=job.load(job.teacher_folder), args=arguments, **job.trainer_inputs()
    )
    return trained(job, trainer, "stage-1") | {"scores": job.score(job.validate(job.load(job.run.folder("stage-1"))))}


def distil_stage_two(job: ImageJob) -> dict[str, Any]:
    """Continues with 1-bit weights."""
    options = job.arguments.student
    arguments = image_arguments(
        ReBNNTrainingArguments,
        job,
        "latent",
        learning_rate=options.learning_rate,
        latent_learning_rate=options.latent_learning_rate,
        scale_learning_rate=options.scale_learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        logits_loss="soft_cross_entropy",
        hidden_weight=0.0,
        log_oscillation="layer",
        plot_oscillation=False,  # the report draws it, also after an interruption
    )
    set_seed(job.arguments.run.seed)
    student = binary_student(job)
    load_stage_one(student.timm_model, job.load(job.run.folder("stage-1")).timm_model.state_dict())
    teacher = job.load(job.teacher_folder)
    trainer = StageTwoTrainer(model=student, teacher=teacher, args=arguments, ema=options.ema, **job.trainer_inputs())
    return trained(job, trainer, "latent", averaged=options.ema is not None)


def binary_student(job: ImageJob) -> PreTrainedModel:
    """The student with 1-bit weights under the balance rule that was asked for, untrained.

    Raises:
        SystemExit: In one sentence, if the architecture has no 1-bit weights.
    """
    student = rebnn_hf.binarize(job.new_student(binary_weights=True))
    built_in = student.config.quantization_config
    student.config.quantization_config = replace(built_in, **job.arguments.balance.given())
    return student


# What the stages have in common


def image_arguments(kind: type[TrainingArguments], job: ImageJob, stage: str, **specific: Any) -> TrainingArguments:
    """The arguments that all stages share, and the `specific` ones of a stage. Gradients are not clipped."""
    return training_arguments(
        kind,
        job,
        stage,
        seed=job.arguments.run.seed,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_num_workers=job.arguments.data.workers,
        **specific,
    )


def trained(job: ImageJob, trainer: Trainer, stage: str, averaged: bool = False) -> dict[str, Any]:
    """Trains, leaves the model, or its average, in the stage's folder, and returns what the stage records of it."""
    training = train_logged(job, trainer, stage)
    model = job.load(training.checkpoint)
    if averaged:
        load_average(model, training.checkpoint)
    save(job, model, stage)
    return trained_record([training])


if __name__ == "__main__":
    main()
