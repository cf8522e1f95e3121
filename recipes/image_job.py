"""A run of `image_classification.py`: its images, what its models see of them, and what they are scored by."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import timm
from datasets import DatasetDict
from image_arguments import ImageArguments
from image_data import ImageTask, digest_images, load_images, spread
from image_transforms import EvaluationImages, TrainingImages, evaluation_transform, training_transform
from recipe_job import Job, Logits, load_pretrained
from recipe_training import outputs_of
from timm.data import resolve_data_config
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    default_data_collator,
)

BEST = 5  # classes that `top5_accuracy` looks at


class ImageJob(Job):
    """Images of one class each."""

    script = "recipes/image_classification.py"
    auto_model = AutoModelForImageClassification
    pipeline_tag = "image-classification"
    libraries = (timm,)
    usage = """\
import rebnn_hf.vision  # the architecture
from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/folder")"""

    arguments: ImageArguments
    task: ImageTask

    @staticmethod
    def load_data(arguments: ImageArguments) -> tuple[ImageTask, DatasetDict]:
        """The task and its splits."""
        options = arguments.data
        try:
            task, data = load_images(
                options.dataset or "digits", options.data_dir, options.image_column, options.label_column
            )
        except ValueError as error:
            raise SystemExit(f"{error}") from None
        limits = {"train": options.max_train_samples, "validation": options.max_eval_samples}
        return task, DatasetDict({name: spread(split, limits[name]) for name, split in data.items()})

    @staticmethod
    def digest(data: DatasetDict) -> str:
        """Tells whether two runs saw the same images, wherever they came from."""
        return digest_images(data)

    # The models

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """What timm has to know of the images: that of the teacher, in the size that was asked for."""
        given = self.arguments.teacher.teacher is not None
        source = self.teacher_folder if given else self.arguments.teacher.pretrained
        config = {} if source is None else pretrained_cfg(source)
        wanted = {"img_size": self.arguments.data.image_size, "crop_pct": self.task.crop_pct}
        return resolve_data_config(wanted, pretrained_cfg=config)

    def new_model(self, architecture: str, **model_args: Any) -> PreTrainedModel:
        """A model of timm with its own first weights.

        Raises:
            SystemExit: In one sentence, if there is no such model.
        """
        names = dict(enumerate(self.task.labels))
        config = TimmWrapperConfig(
            architecture=architecture,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            model_args=model_args,
            pretrained_cfg=self.data_config,
        )
        try:
            model = TimmWrapperForImageClassification(config)
            # The wrapper fills a model with normal values; they are no start to train from.
            model.timm_model = timm.create_model(architecture, num_classes=self.task.num_labels, **model_args)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            options = ", ".join(f"{name}={value!r}" for name, value in model_args.items())
            reason = " ".join(str(error).split())
            raise SystemExit(f"timm cannot make a {architecture} with {options or 'no options'}: {reason}") from None
        return model

    def new_student(self, binary_weights: bool) -> PreTrainedModel:
        """The student of stage one (float weights) or stage two (1-bit weights), untrained."""
        stem = self.arguments.student.stem
        options = {} if stem is None else {"stem": stem}
        return self.new_model(self.arguments.student.model, binary_weights=binary_weights, **options)

    # Their inputs and outputs

    def trainer_inputs(self) -> dict[str, Any]:
        """What all Trainers train on."""
        transform = training_transform(self.data_config, digits=self.task.name == "digits")
        images = TrainingImages(self.data["train"], transform, self.arguments.run.seed)
        return {"train_dataset": images, "data_collator": default_data_collator}

    def validate(self, model: PreTrainedModel) -> Logits:
        """The logits of `model` on the validation images."""
        images = EvaluationImages(self.data["validation"], evaluation_transform(self.data_config))
        workers = {"dataloader_num_workers": self.arguments.data.workers}
        (logits,) = outputs_of(model, images, default_data_collator, self.run.root, **workers)
        return {"validation": logits}

    def score(self, logits: Logits) -> dict[str, float]:
        """The accuracy and, where there are many classes, that of the best five."""
        values, labels = logits["validation"], np.asarray(self.data["validation"]["label"])
        if np.isnan(values).any():
            raise ValueError("the model's outputs contain NaN: it has diverged, try a lower learning rate")
        best = (-values).argsort(-1, kind="stable")
        hits = {"accuracy": best[:, 0] == labels, "top5_accuracy": (best[:, :BEST] == labels[:, None]).any(-1)}
        return {name: float(hits[name].mean()) for name in self.task.metrics}

    # What the model card says

    @property
    def origin(self) -> None:
        """Nothing: the student is trained from scratch."""
        return None

    @property
    def title(self) -> str:
        """Architecture and data."""
        return f"{self.arguments.student.model} with 1-bit weights and activations, trained on {self.task.title}"

    @property
    def model_name(self) -> str:
        """The same in short."""
        return f"{self.arguments.student.model}-{self.task.name}-1bit"

    @property
    def about(self) -> str:
        """What is 1-bit, and how the model was made."""
        teacher = self.arguments.teacher.teacher or self.arguments.teacher.teacher_model
        return (
            "Made with rebnn_hf: the weights of the layers listed below are stored as one bit each, with one scale per "
            f"output channel, and their inputs are signs. The model was distilled from {teacher} in two stages, with "
            "float weights first."
        )


def pretrained_cfg(source: Any) -> dict[str, Any]:
    """What a timm model in a folder or on the Hub says of its images.

    Raises:
        SystemExit: If it is not a timm model.
    """
    config = load_pretrained(AutoConfig.from_pretrained, source)
    if not isinstance(config, TimmWrapperConfig):
        raise SystemExit(f"{source} is a {config.model_type} model: a teacher must be a timm model in transformers.")
    return getattr(config, "pretrained_cfg", {})
