"""From images with boxes to a packed detector: Faster R-CNN with a feature pyramid on a 1-bit backbone.

    python recipes/detection.py                                                 # coloured shapes, made here: minutes
    accelerate launch recipes/detection.py --data_dir coco --backbone runs/imagenet/latent
    accelerate launch recipes/detection.py --data_dir VOCdevkit --backbone runs/imagenet/latent \\
        --train_split VOC2007/trainval VOC2012/trainval --validation_split VOC2007/test
    accelerate launch recipes/detection.py --data_dir coco --model resnet18     # the float baseline

Stages: train the detector, first with float weights and 1-bit activations in its backbone unless the backbone has been
trained with 1-bit weights before, then with 1-bit weights too; pack them into bits, reload the packed folder and
evaluate it. A float backbone has one stage, `float`. Leaves `results.json`, a model card and plots of oscillation and
weights. Interrupted, the same command continues where it stopped; stages that are complete are not repeated.

The optimizer is AdamW, as in the other recipes: a sign flips when its latent weight crosses zero, and the gradients of
latent weights are scaled by alpha and much smaller than those of the heads. SGD would need learning rates of their own
for them; Adam's steps do not depend on the size of gradients.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from detection_arguments import parse_detection_arguments
from detection_job import DetectionJob, prepare_detection
from detection_report import print_summary, write_report
from detection_scores import Scores
from detection_training import BinaryDetectionTrainer, DetectionTrainer, largest_difference
from recipe_report import is_reported
from recipe_training import save, train_logged, trained_record, training_arguments
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments
from rebnn_hf.kernels import use_backend
from rebnn_hf.vision import load_stage_one

COMPARED_IMAGES = 16  # on which the packed model is compared with the latent one, by torch's slow products
MOST_DIFFERENT = 1e-2  # pixels or scores, by rounding in float32


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    run_stages(prepare_detection(parse_detection_arguments(argv)))


def run_stages(job: DetectionJob) -> None:
    """Runs what is left to do."""
    actions = {"float": train_float, "stage-1": train_stage_one, "latent": train_latent, "packed": pack_detector}
    for stage in job.run.stages:
        job.stage(stage, actions[stage])
    if job.process.is_main_process:
        if not is_reported(job):
            write_report(job)
        print_summary(job.run.results())
    job.process.wait_for_everyone()
    PartialState().destroy_process_group()


# Training


def train_float(job: DetectionJob) -> dict[str, Any]:
    """Trains a detector on a float backbone."""
    set_seed(job.arguments.run.seed)
    model = job.new_model()
    job.begin_with_classifier(model)
    return trained(job, float_trainer(job, model, "float", **last_stage(job)), "float")


def train_stage_one(job: DetectionJob) -> dict[str, Any]:
    """Trains a detector whose backbone has float weights and 1-bit activations."""
    options = job.arguments.training
    set_seed(job.arguments.run.seed)
    model = job.new_model(binary_weights=False)
    job.begin_with_classifier(model)
    rates = {"learning_rate": options.stage_one_learning_rate, "num_train_epochs": options.stage_one_epochs}
    return trained(job, float_trainer(job, model, "stage-1", **rates), "stage-1")


def train_latent(job: DetectionJob) -> dict[str, Any]:
    """Trains a detector whose backbone is 1-bit, from the stage before or from the classifier."""
    options = job.arguments.training
    arguments = detection_arguments(
        ReBNNTrainingArguments,
        job,
        "latent",
        latent_learning_rate=options.latent_learning_rate,
        scale_learning_rate=options.scale_learning_rate,
        log_oscillation="layer",
        plot_oscillation=False,  # the report draws it, also after an interruption
        **last_stage(job),
    )
    set_seed(job.arguments.run.seed)
    model = job.new_binary_model()
    if "stage-1" in job.run.stages:
        continue_stage_one(model, job.load(job.run.folder("stage-1")))
    else:
        job.begin_with_classifier(model)
    return trained(job, BinaryDetectionTrainer(model=model, args=arguments, **job.trainer_inputs()), "latent")


def continue_stage_one(model: PreTrainedModel, before: PreTrainedModel) -> None:
    """Begins the stage with 1-bit weights with everything that was learned with float ones."""
    load_stage_one(model.backbone, before.backbone.state_dict())
    for part in ("fpn", "rpn", "roi_heads"):
        model.get_submodule(part).load_state_dict(before.get_submodule(part).state_dict())


def last_stage(job: DetectionJob) -> dict[str, Any]:
    """Learning rate and length of the stage that ends with the detector."""
    options = job.arguments.training
    return {"learning_rate": options.learning_rate, "num_train_epochs": options.epochs}


def float_trainer(job: DetectionJob, model: PreTrainedModel, stage: str, **specific: Any) -> Trainer:
    """The Trainer of a stage with float weights."""
    arguments = detection_arguments(TrainingArguments, job, stage, **specific)
    return DetectionTrainer(model=model, args=arguments, **job.trainer_inputs())


def detection_arguments(
    kind: type[TrainingArguments], job: DetectionJob, stage: str, **specific: Any
) -> TrainingArguments:
    """The arguments that all stages share, and the `specific` ones of a stage. Gradients are not clipped."""
    return training_arguments(
        kind,
        job,
        stage,
        seed=job.arguments.run.seed,
        max_steps=job.arguments.training.max_steps,
        weight_decay=job.arguments.training.weight_decay,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_num_workers=job.arguments.data.workers,
        **specific,
    )


def trained(job: DetectionJob, trainer: Trainer, stage: str) -> dict[str, Any]:
    """Trains, leaves the model in the stage's folder, and returns what the stage records of it."""
    training = train_logged(job, trainer, stage)
    model = job.load(training.checkpoint)
    save(job, model, stage)
    return trained_record([training]) | scores_record(job.score(job.validate(model)))


def scores_record(scores: Scores) -> dict[str, Any]:
    """Scores as a stage records them."""
    return {"scores": scores.means, "scores_by_class": scores.by_class}


# Packing


def pack_detector(job: DetectionJob) -> dict[str, Any]:
    """Packs the detector, reloads it as a user would, compares the two and scores what was reloaded."""
    model = job.load(job.run.folder("latent"))
    with use_backend("reference"):  # the engine rounds elsewhere, which signs may turn into others
        latent = job.validate(model, COMPARED_IMAGES)
        difference = largest_difference(latent, job.validate(rebnn_hf.pack(model), COMPARED_IMAGES))
    if not difference <= MOST_DIFFERENT:
        raise RuntimeError(
            f"the packed detector does not find what the trained one does: boxes or scores differ by {difference:.3g}. "
            "Nothing is reported."
        )
    save(job, rebnn_hf.pack(model, job.arguments.packed_dtype()), "packed")
    packed = job.load(job.run.folder("packed"))
    summary = rebnn_hf.summary(packed)
    record = {"largest_difference": difference, "size": summary.totals, "layers": str(summary)}
    return record | scores_record(job.score(job.validate(packed)))


if __name__ == "__main__":
    main()
