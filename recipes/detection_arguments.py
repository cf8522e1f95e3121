"""The command line of `detection.py`: its options, and which of them shape which stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from detection_data import DetectionTask
from recipe_arguments import BalanceArguments, RunArguments, balance_partners, option, parse_groups
from recipe_checks import check_numbers, check_partners

from rebnn_hf import ReBNNConfig

DEFAULT_MODEL = "rebnn_resnet18"


@dataclass
class DetectionDataArguments:
    """What is learned."""

    _argument_group_name = "data"

    data_dir: str | None = option("folder in the format of COCO or Pascal VOC; default: coloured shapes, made here")
    train_split: list[str] = field(
        default_factory=list,
        metadata={
            "help": "splits to train on, e.g. VOC2007/trainval VOC2012/trainval; default: the usual",
            "nargs": "+",
        },
    )
    validation_split: list[str] = field(
        default_factory=list,
        metadata={"help": "splits to evaluate on, e.g. VOC2007/test; default: the usual", "nargs": "+"},
    )
    skip_bad_boxes: bool = option("leave out boxes that are empty or leave their image", default=False)
    max_train_samples: int | None = option("train on this many images only (from all over the split)")
    max_eval_samples: int | None = option("evaluate on this many images only (from all over the split)")
    workers: int = option("processes that read images; default: 0, the training itself", default=0)

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if self.data_dir is None and (self.train_split or self.validation_split):
            raise ValueError("--train_split and --validation_split are splits of --data_dir: pass that too")
        if bool(self.train_split) != bool(self.validation_split):
            raise ValueError("--train_split and --validation_split belong together: pass both")


@dataclass
class DetectorArguments:
    """The detector."""

    _argument_group_name = "detector"

    model: str | None = option(
        f"backbone: a 1-bit architecture of rebnn_hf.vision, or a float one of timm; default: {DEFAULT_MODEL}"
    )
    backbone: str | None = option(
        "folder of a classifier to begin with, e.g. runs/imagenet/latent of image_classification.py; it brings its "
        "architecture and how images are normalized; default: a backbone from nothing"
    )
    stem: Literal["imagenet", "cifar"] | None = option(
        "first layers of a 1-bit ResNet: `imagenet` makes sides 4 times smaller, `cifar` keeps them; default: imagenet"
    )
    min_size: int | None = option("images are resized until the shorter side has this size; default: the data set's")
    max_size: int | None = option("... or the longer side this one; default: the data set's")
    anchor_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "five sides of anchors, from the finest level on; default: the data set's", "nargs": "+"},
    )
    fpn_channels: int | None = option("channels of the feature pyramid; default: the data set's")
    head_size: int | None = option("size of the hidden layers of the head; default: the data set's")

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if self.backbone is not None and (self.model is not None or self.stem is not None):
            raise ValueError("--backbone brings its own architecture: leave out --model and --stem")
        if self.anchor_sizes and (len(self.anchor_sizes) != 5 or min(self.anchor_sizes) <= 0):
            raise ValueError(f"--anchor_sizes {self.anchor_sizes} must be five positive sizes, one for each level")


@dataclass
class DetectionTrainingArguments:
    """How it is trained: with AdamW, by all stages."""

    _argument_group_name = "training"

    batch_size: int | None = option("images per step, over all processes; default: the data set's")
    stage_one_learning_rate: float | None = option("of the stage with float weights before; default: the data set's")
    stage_one_epochs: float | None = option("the same; default: the data set's")
    learning_rate: float | None = option("default: the data set's")
    latent_learning_rate: float | None = option("of the latent weights; default: the learning rate")
    scale_learning_rate: float | None = option("of the scales; default: the learning rate")
    weight_decay: float = option("of the float weights", default=1e-4)
    epochs: float | None = option("default: the data set's")
    max_steps: int = option("this many steps of each stage instead of epochs; -1 counts epochs", default=-1)
    warm_up: float | None = option("share of the steps before the learning rate falls; default: the data set's")

    def shared(self) -> dict[str, Any]:
        """The options of every stage."""
        return {name: getattr(self, name) for name in ("batch_size", "weight_decay", "max_steps", "warm_up")}

    def stage_one(self) -> dict[str, Any]:
        """The options of the stage with float weights before."""
        return {name: getattr(self, name) for name in ("stage_one_learning_rate", "stage_one_epochs")}

    def last_stage(self, binary: bool) -> dict[str, Any]:
        """The options of the stage that ends with the detector, `binary` or float."""
        rates = ("latent_learning_rate", "scale_learning_rate") if binary else ()
        return {name: getattr(self, name) for name in ("learning_rate", *rates, "epochs")}


@dataclass
class DetectionRunArguments(RunArguments):
    """Where and how everything runs."""

    logging_steps: int | None = option("steps between log lines; default: the data set's")


@dataclass
class DetectionArguments:
    """The whole command line: `argv` as it was typed, and what it says."""

    argv: list[str]
    data: DetectionDataArguments
    detector: DetectorArguments
    training: DetectionTrainingArguments
    balance: BalanceArguments
    run: DetectionRunArguments

    @property
    def student(self) -> DetectionTrainingArguments:
        """Where the code that all recipes share looks for batch size and warm-up."""
        return self.training

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        check_numbers(self)
        for group in (self.data, self.detector, self.balance):
            group.check()
        check_partners(self.argv, balance_partners([ReBNNConfig(**self.balance.given())]))

    def fill_in(self, task: DetectionTask) -> None:
        """Gives every option left out the default of `task`."""
        anchors, folder = list(task.anchor_sizes), str(default_folder(task.name))
        defaults = {**asdict(task), "anchor_sizes": anchors, "output_dir": folder}
        for group in (self.detector, self.training, self.run):
            for name, value in asdict(group).items():
                if value in (None, []) and name in defaults:
                    setattr(group, name, defaults[name])

    def to_dict(self) -> dict[str, Any]:
        """All options with the values in use."""
        groups = (self.data, self.detector, self.training, self.balance, self.run)
        return {name: value for group in groups for name, value in asdict(group).items()}

    def stage_settings(self, data_digest: str, stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """For each of these stages the settings its result depends on, beside those of the stages before it."""
        binary = "packed" in stages
        last = self.training.last_stage(binary)
        own = {
            "stage-1": self.training.stage_one(),
            "float": last,
            "latent": last | self.balance.given(),
            "packed": {"packed_dtype": self.run.packed_dtype},
        }
        settings = {stage: own[stage] for stage in stages}
        begun_with = {"data": data_digest, **asdict(self.detector), **self.training.shared(), **self.run.settings()}
        return settings | {stages[0]: begun_with | settings[stages[0]]}

    def packed_dtype(self) -> torch.dtype:
        """The dtype of what stays float in the packed model."""
        return getattr(torch, self.run.packed_dtype)


def default_folder(task: str) -> Path:
    """Where a run goes without --output_dir."""
    return Path("runs") / task


def parse_detection_arguments(argv: list[str] | None = None) -> DetectionArguments:
    """Reads the command line; `DetectionArguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    groups = (
        DetectionDataArguments,
        DetectorArguments,
        DetectionTrainingArguments,
        BalanceArguments,
        DetectionRunArguments,
    )
    return parse_groups(DetectionArguments, groups, argv)
