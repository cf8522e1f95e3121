"""A run of `detection.py`: its images, its stages, the detectors, and what they are scored by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torchvision
from detection_arguments import DEFAULT_MODEL, DetectionArguments, default_folder
from detection_data import DetectionTask, Splits, digest, load_folder, load_shapes, spread
from detection_images import TrainingDetections, collate
from detection_scores import Detections, Scores, score
from detection_training import detect
from recipe_folder import RunFolder
from recipe_job import Job, begin, check_processes, hint_at_idle_cores, load_pretrained, start_process
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, PreTrainedModel

import rebnn_hf
from rebnn_hf.vision.detection import FasterRCNNConfig, FasterRCNNForObjectDetection, load_classifier

BINARY_STAGES = ("stage-1", "latent", "packed")
FLOAT_STAGES = ("float",)


@dataclass
class DetectionJob(Job):
    """Images with boxes.

    Attributes:
        classifier: What the backbone begins with; None: from nothing.
    """

    script = "recipes/detection.py"
    auto_model = AutoModelForObjectDetection
    pipeline_tag = "object-detection"
    library_name = "rebnn_hf"  # no pipeline of transformers knows the architecture
    libraries = (timm, torchvision)
    usage = """\
import rebnn_hf.vision.detection  # the architecture
from transformers import AutoModelForObjectDetection

model = AutoModelForObjectDetection.from_pretrained("path/to/this/folder", dtype="float32")
detections = model(images).detections  # of images [3, H, W] with values from 0 to 1"""

    arguments: DetectionArguments
    task: DetectionTask
    data: Splits
    classifier: PreTrainedModel | None = field(default=None, kw_only=True)

    @staticmethod
    def load_data(arguments: DetectionArguments) -> tuple[DetectionTask, Splits]:
        """The task and its splits."""
        given = arguments.data
        try:
            if given.data_dir is None:
                task, splits = load_shapes(Path(arguments.run.output_dir or default_folder("shapes")) / "shapes")
            else:
                folder = Path(given.data_dir)
                task, splits = load_folder(folder, given.train_split, given.validation_split, given.skip_bad_boxes)
        except (ValueError, OSError) as error:
            raise SystemExit(f"{error}") from None
        limits = {"train": given.max_train_samples, "validation": given.max_eval_samples}
        return task, {name: spread(images, limits[name]) for name, images in splits.items()}

    # The models

    @property
    def binary(self) -> bool:
        """Whether the detector ends up 1-bit."""
        return "packed" in self.run.stages

    @cached_property
    def backbone_options(self) -> dict[str, Any]:
        """Architecture of the backbone and how its images are normalized, as the config has it."""
        return backbone_options(self.arguments, self.classifier)

    def new_model(self, **backbone_args: Any) -> PreTrainedModel:
        """A detector with a backbone from nothing."""
        return new_model(self.arguments, self.task, self.backbone_options, **backbone_args)

    def new_binary_model(self) -> PreTrainedModel:
        """A detector with a 1-bit backbone under the balance rule that was asked for."""
        model = rebnn_hf.binarize(self.new_model(binary_weights=True))
        built_in = model.config.quantization_config
        model.config.quantization_config = replace(built_in, **self.arguments.balance.given())
        return model

    def begin_with_classifier(self, model: PreTrainedModel) -> None:
        """Gives a new detector the weights of the classifier, if there is one.

        Raises:
            SystemExit: If they do not fit.
        """
        if self.classifier is not None:
            try:
                load_classifier(model, self.classifier)
            except ValueError as error:
                raise SystemExit(f"--backbone {self.arguments.detector.backbone}: {error}") from None

    # Their inputs and outputs

    def trainer_inputs(self) -> dict[str, Any]:
        """What all Trainers train on."""
        return {
            "train_dataset": TrainingDetections(self.data["train"], self.arguments.run.seed),
            "data_collator": collate,
        }

    def validate(self, model: PreTrainedModel, limit: int | None = None) -> list[Detections]:
        """What `model` finds on the validation images, or on at most `limit` of them."""
        return detect(model, spread(self.data["validation"], limit), self.process, self.arguments.data.workers)

    def score(self, detections: list[Detections]) -> Scores:
        """Average precisions of what was found on the validation images."""
        return score(self.data["validation"], detections, self.task.labels)

    # What the model card says

    @property
    def origin(self) -> None:
        """Nothing: a classifier in a folder means nothing to the reader of a card."""
        return None

    @property
    def title(self) -> str:
        """Architecture and data."""
        what = "with 1-bit weights and activations in the backbone" if self.binary else "in float"
        return f"Faster R-CNN on {self.backbone_options['backbone']} {what}, trained on {self.task.title}"

    @property
    def model_name(self) -> str:
        """The same in short."""
        name = f"faster-rcnn-{self.backbone_options['backbone']}-{self.task.name}"
        return f"{name}-1bit" if self.binary else name

    @property
    def about(self) -> str:
        """What is 1-bit."""
        if not self.binary:
            return "A float detector, made with rebnn_hf to compare 1-bit ones with."
        return (
            "Made with rebnn_hf: the weights of the convolutions listed below are stored as one bit each, with one "
            "scale per output channel, and their inputs are signs. Feature pyramid, region proposals and heads are "
            "float."
        )


def prepare_detection(arguments: DetectionArguments) -> DetectionJob:
    """Loads the data, finds out which stages there are, and opens the output folder.

    Raises:
        SystemExit: If data or model cannot be had, or the folder holds a run with other settings.
    """
    process = start_process()
    hint_at_idle_cores(process)
    classifier = load_backbone(arguments.detector.backbone)
    with process.main_process_first():
        task, data = DetectionJob.load_data(arguments)
    arguments.fill_in(task)
    check_processes(arguments, process)
    stages = find_stages(arguments, task, classifier)
    run = RunFolder(arguments.run.output_dir, stages)
    settings = arguments.stage_settings(digest(data, task.labels), stages)
    begin(run, settings, arguments.run.overwrite, process)
    return DetectionJob(arguments, task, data, None, run, None, process, classifier=classifier)


def load_backbone(source: str | None) -> PreTrainedModel | None:
    """The classifier that --backbone names.

    Raises:
        SystemExit: If there is none, or its weights are packed already.
    """
    if source is None:
        return None
    classifier = load_pretrained(AutoModelForImageClassification.from_pretrained, source, dtype="float32")
    if not hasattr(classifier, "timm_model"):
        raise SystemExit(f"--backbone {source} is a {classifier.config.model_type} model: expected one of timm.")
    if any(isinstance(module, rebnn_hf.PackedConv2d) for module in classifier.modules()):
        raise SystemExit(f"--backbone {source} is packed and cannot be trained: pass the folder `latent` of its run.")
    return classifier


def backbone_options(arguments: DetectionArguments, classifier: PreTrainedModel | None) -> dict[str, Any]:
    """Architecture of the backbone and how its images are normalized, as the config of a detector has it."""
    if classifier is None:
        stem = arguments.detector.stem
        name = arguments.detector.model or DEFAULT_MODEL
        return {"backbone": name, "backbone_args": {} if stem is None else {"stem": stem}}
    config = classifier.config
    given = {name: value for name, value in (config.model_args or {}).items() if name != "binary_weights"}
    options = {"backbone": config.architecture, "backbone_args": given}  # which weights are 1-bit, the stages say
    for name in ("mean", "std"):
        if name in getattr(config, "pretrained_cfg", {}):
            options[f"image_{name}"] = list(config.pretrained_cfg[name])
    return options


def new_model(
    arguments: DetectionArguments, task: DetectionTask, backbone: dict[str, Any], **backbone_args: Any
) -> PreTrainedModel:
    """A detector with a backbone from nothing.

    Raises:
        SystemExit: In one sentence, if timm has no such backbone, or it cannot serve as one.
    """
    names = dict(enumerate(task.labels))
    sizes = {name: getattr(arguments.detector, name) for name in ("min_size", "max_size", "fpn_channels", "head_size")}
    config = FasterRCNNConfig(
        **{**backbone, "backbone_args": {**backbone["backbone_args"], **backbone_args}},
        **sizes,
        anchor_sizes=arguments.detector.anchor_sizes,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    try:
        return FasterRCNNForObjectDetection(config)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"no detector with the backbone {config.backbone}: {' '.join(str(error).split())}") from None


def find_stages(
    arguments: DetectionArguments, task: DetectionTask, classifier: PreTrainedModel | None
) -> tuple[str, ...]:
    """The stages of a run: a backbone that has learned with 1-bit weights needs no stage with float ones.

    Raises:
        SystemExit: If there is no such backbone, or options are given that do nothing with a float one.
    """
    options = backbone_options(arguments, classifier)
    model = new_model(arguments, task, options)
    if any(isinstance(module, rebnn_hf.BinaryConv2d) for module in model.modules()):
        learned = classifier is not None and any(isinstance(m, rebnn_hf.BinaryConv2d) for m in classifier.modules())
        return BINARY_STAGES[1:] if learned else BINARY_STAGES
    names = ("latent_learning_rate", "scale_learning_rate")
    given = {**arguments.balance.given(), **{name: getattr(arguments.training, name) for name in names}}
    if useless := [name for name, value in given.items() if value is not None]:
        raise SystemExit(f"--{useless[0]} does nothing: the backbone {options['backbone']} is float.")
    return FLOAT_STAGES
