"""The command line of `image_classification.py`: its options, and which of them shape which stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from image_data import ImageTask
from recipe_arguments import (
    BalanceArguments,
    Distillation,
    RunArguments,
    balance_partners,
    option,
    parse_groups,
)
from recipe_checks import check_numbers, check_partners

from rebnn_hf import ReBNNConfig


@dataclass
class ImageDataArguments:
    """What is learned."""

    _argument_group_name = "data"

    dataset: str | None = option("`digits`, which comes with scikit-learn, or a data set on the Hub; default: digits")
    data_dir: str | None = option("folder with train/CLASS/ and validation/CLASS/ (or val, test)")
    image_column: str | None = option("of a --dataset with several columns of images")
    label_column: str | None = option("of a --dataset with several columns of classes, such as fine and coarse ones")
    image_size: int | None = option("side of the images that the models see; default: the data set's or the teacher's")
    max_train_samples: int | None = option("train on this many images only (from all over the split)")
    max_eval_samples: int | None = option("evaluate on this many images only (from all over the split)")
    workers: int = option("processes that read images; default: 0, the training itself", default=0)

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if self.dataset is not None and self.data_dir is not None:
            raise ValueError("--data_dir brings its own data set: leave out --dataset")
        for name in ("image_column", "label_column"):
            if getattr(self, name) is not None and self.dataset in (None, "digits"):
                raise ValueError(f"--{name} {getattr(self, name)} does nothing without a --dataset of the Hub")

    def scoring(self) -> dict[str, Any]:
        """The options that shape the scores of the same models."""
        return {}


@dataclass
class ImageTeacherArguments:
    """The float model: what it is and how it is trained."""

    _argument_group_name = "teacher"

    teacher: str | None = option("an already trained timm model (folder or Hub name); without it one is trained first")
    teacher_model: str | None = option(
        "name of a timm architecture to train from nothing, or, with a slash, of a timm model on the Hub or in a "
        "folder to fine-tune; default: resnet18 for digits, otherwise timm/resnet34.a1_in1k"
    )
    teacher_learning_rate: float | None = option("default: the data set's")
    teacher_epochs: float | None = option("default: the data set's")

    @property
    def pretrained(self) -> str | None:
        """The model to fine-tune; None: one from nothing."""
        return self.teacher_model if "/" in self.teacher_model else None


@dataclass
class ImageStudentArguments:
    """The 1-bit model and its two stages: first the activations, then the weights too."""

    _argument_group_name = "student"

    model: str = option("a 1-bit architecture of rebnn_hf.vision", default="rebnn_resnet18")
    stem: Literal["imagenet", "cifar"] | None = option(
        "first layers of a ResNet: `imagenet` makes the sides 4 times smaller, `cifar` keeps them; default: imagenet"
    )
    batch_size: int | None = option("images per step, over all processes; default: 64 for digits, otherwise 512")
    stage_one_learning_rate: float | None = option("default: the data set's, 2.5e-3 in the paper")
    stage_one_epochs: float | None = option("default: the data set's, 128 in the paper")
    stage_one_weight_decay: float = option("of the convolutions", default=1e-5)
    learning_rate: float | None = option("of the second stage; default: the data set's, 1e-3 in the paper")
    latent_learning_rate: float | None = option("of the latent weights; default: the learning rate")
    scale_learning_rate: float | None = option("of the scales; default: the learning rate")
    epochs: float | None = option("of the second stage; default: the data set's, 256 in the paper")
    ema: float | None = option(
        "average the latent weights of the second stage with this decay, 0.999 say, and pack the average; default: none"
    )
    max_steps: int = option("this many steps of each stage instead of epochs; -1 counts epochs", default=-1)
    warm_up: float = option("share of the steps before the learning rate falls linearly to 0; default: 0", default=0.0)

    def stage_one(self) -> dict[str, Any]:
        """The options of the model and its first stage."""
        own = {name: value for name, value in asdict(self).items() if name.startswith("stage_one_")}
        return {"model": self.model, "stem": self.stem, **own, "max_steps": self.max_steps}

    def stage_two(self) -> dict[str, Any]:
        """The options of the second stage."""
        names = ("learning_rate", "latent_learning_rate", "scale_learning_rate", "epochs", "ema", "max_steps")
        return {name: getattr(self, name) for name in names}


@dataclass
class ImageRunArguments(RunArguments):
    """Where and how everything runs."""

    logging_steps: int | None = option("steps between log lines; default: 10 for digits, otherwise 500")


@dataclass
class ImageArguments:
    """The whole command line: `argv` as it was typed, and what it says."""

    argv: list[str]
    data: ImageDataArguments
    teacher: ImageTeacherArguments
    student: ImageStudentArguments
    balance: BalanceArguments
    run: ImageRunArguments

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        check_numbers(self)
        self.data.check()
        if self.student.ema is not None and not 0 < self.student.ema < 1:
            raise ValueError(f"--ema {self.student.ema} is a decay: more than 0 and less than 1")
        self.balance.check()
        check_partners(self.argv, balance_partners([ReBNNConfig(**self.balance.given())]))

    def fill_in(self, task: ImageTask) -> None:
        """Gives every option left out the default of `task`."""
        groups = (self.data, self.teacher, self.student, self.run)
        defaults = {**asdict(task), "output_dir": str(Path("runs") / task.name)}
        for group in groups:
            for name, value in asdict(group).items():
                if value is None and name in defaults:
                    setattr(group, name, defaults[name])

    def distillations(self) -> list[Distillation]:
        """The stages between teacher and packed model."""
        return [Distillation("stage-1", None, None), Distillation("latent", None, "stage-1")]

    def to_dict(self) -> dict[str, Any]:
        """All options with the values in use."""
        groups = (self.data, self.teacher, self.student, self.balance, self.run)
        return {name: value for group in groups for name, value in asdict(group).items()}

    def stage_settings(self, data_digest: str) -> dict[str, dict[str, Any]]:
        """For each stage the settings its result depends on, beside those of the stages before it."""
        return {
            "teacher": {
                "data": data_digest,
                "image_size": self.data.image_size,
                **asdict(self.teacher),
                "batch_size": self.student.batch_size,
                "warm_up": self.student.warm_up,
                **self.run.settings(),
            },
            "stage-1": self.student.stage_one(),
            "latent": self.student.stage_two() | self.balance.given(),
            "packed": {"packed_dtype": self.run.packed_dtype},
        }

    def packed_dtype(self) -> torch.dtype:
        """The dtype of what stays float in the packed model."""
        return getattr(torch, self.run.packed_dtype)


def parse_image_arguments(argv: list[str] | None = None) -> ImageArguments:
    """Reads the command line; `ImageArguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    groups = (ImageDataArguments, ImageTeacherArguments, ImageStudentArguments, BalanceArguments, ImageRunArguments)
    return parse_groups(ImageArguments, groups, argv)
