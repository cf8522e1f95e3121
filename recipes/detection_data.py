"""The data of `detection.py`: folders in the formats of COCO and Pascal VOC, or the embedded shapes.

A split is named by its path: `train2017` of a folder `coco` is `coco/annotations/instances_train2017.json` with the
images in `coco/train2017`, and `VOC2007/trainval` of `VOCdevkit` is `VOCdevkit/VOC2007/ImageSets/Main/trainval.txt`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import detection_coco
import detection_voc
import numpy as np
from detection_images import AnnotatedImage, with_good_boxes
from detection_shapes import write_shapes
from recipe_task import Task

PAIRS = (
    ("trainval", "test"),
    ("train2017", "val2017"),
    ("train2014", "val2014"),
    ("train", "val"),
    ("train", "validation"),
    ("train", "test"),
)  # what to train and to evaluate on, in order of preference
SAMPLED_IMAGES = 64  # tell whether two runs saw the same data
Splits = dict[str, list[AnnotatedImage]]


@dataclass(frozen=True, kw_only=True)
class DetectionTask(Task):
    """Images with boxes, and how to train on them by default; the attributes are options of `detection_arguments`."""

    min_size: int
    max_size: int
    anchor_sizes: tuple[int, ...]
    fpn_channels: int
    head_size: int
    batch_size: int
    stage_one_learning_rate: float
    stage_one_epochs: float
    learning_rate: float
    epochs: float
    warm_up: float
    logging_steps: int


PHOTOS = {  # sizes of the papers, and their 12 rounds over COCO
    "min_size": 800,
    "max_size": 1333,
    "anchor_sizes": (32, 64, 128, 256, 512),
    "fpn_channels": 256,
    "head_size": 1024,
    "batch_size": 16,
    "stage_one_learning_rate": 2e-4,
    "stage_one_epochs": 12,
    "learning_rate": 2e-4,
    "epochs": 12,
    "warm_up": 0.01,
    "logging_steps": 50,
}
SHAPES = {  # minutes on one core
    "min_size": 96,
    "max_size": 96,
    "anchor_sizes": (12, 24, 48, 96, 192),
    "fpn_channels": 64,
    "head_size": 128,
    "batch_size": 4,
    "stage_one_learning_rate": 1e-3,
    "stage_one_epochs": 10,
    "learning_rate": 1e-3,
    "epochs": 15,
    "warm_up": 0.1,
    "logging_steps": 10,
}


def load_shapes(folder: Path) -> tuple[DetectionTask, Splits]:
    """The embedded data, written to `folder`."""
    write_shapes(folder)
    classes, splits = read_splits(folder, ["train"], ["val"], skip_bad=False)
    return _task("shapes", "coloured shapes", classes, SHAPES), splits


def load_folder(
    folder: Path, train: Sequence[str], validation: Sequence[str], skip_bad: bool
) -> tuple[DetectionTask, Splits]:
    """The images of a folder.

    Args:
        folder: In COCO's format or VOC's, or with folders of these formats in it.
        train: Splits to train on; none for the first pair of `PAIRS` that there is.
        validation: Splits to evaluate on; the same.
        skip_bad: Leave out boxes that are empty or leave their image.

    Raises:
        ValueError: If something is missing or wrong.
    """
    if not train:
        pair = default_pair(folder)
        train, validation = [pair[0]], [pair[1]]
    classes, splits = read_splits(folder, train, validation, skip_bad)
    return _task(folder.resolve().name, folder.resolve().name, classes, PHOTOS), splits


def _task(name: str, title: str, classes: tuple[str, ...], defaults: dict) -> DetectionTask:
    metrics = ("mAP", "AP50", "AP75")
    return DetectionTask(name=name, title=title, labels=classes, metrics=metrics, main_metric="mAP", **defaults)


def default_pair(folder: Path) -> tuple[str, str]:
    """The splits to use where none are named.

    Raises:
        ValueError: If there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"--data_dir {folder} is no folder.")
    found = [*detection_coco.splits_in(folder), *detection_voc.splits_in(folder)]
    for pair in PAIRS:
        if set(pair) <= set(found):
            return pair
    raise ValueError(
        f"--data_dir {folder} has the splits {', '.join(found) or 'none'}, in annotations/instances_NAME.json (COCO) "
        "or ImageSets/Main/NAME.txt (VOC): name some with --train_split and --validation_split."
    )


def read_splits(
    folder: Path, train: Sequence[str], validation: Sequence[str], skip_bad: bool
) -> tuple[tuple[str, ...], Splits]:
    """Classes, which are those of the training splits, and the images `train` and `validation`.

    Raises:
        ValueError: If something is missing or wrong.
    """
    parts = {"train": [read_split(folder / name) for name in train]}
    parts["validation"] = [read_split(folder / name) for name in validation]
    classes = list(dict.fromkeys(name for names, _ in parts["train"] for name in names))
    if any(detection_voc.list_file(folder / name).is_file() for name in train):
        classes.sort()
    splits = {}
    for kind, read in parts.items():
        images = [image for names, images in read for image in in_classes(images, names, classes)]
        if not images:
            raise ValueError(f"{folder} has no images to be used for {kind}.")
        splits[kind] = with_good_boxes(images, skip_bad)
    return tuple(classes), splits


def read_split(split: Path) -> tuple[tuple[str, ...], list[AnnotatedImage]]:
    """Classes and images of a split, whichever format it has.

    Raises:
        ValueError: If it has none, or there is something wrong with its files.
    """
    if detection_coco.annotation_file(split).is_file():
        return detection_coco.read_split(split)
    if detection_voc.list_file(split).is_file():
        return detection_voc.read_split(split)
    raise ValueError(
        f"there is no split {split}: neither {detection_coco.annotation_file(split)} (COCO) nor "
        f"{detection_voc.list_file(split)} (VOC) exists."
    )


def in_classes(images: Sequence[AnnotatedImage], names: Sequence[str], classes: Sequence[str]) -> list[AnnotatedImage]:
    """Images whose labels are indices of `names` with labels that are indices of `classes`.

    Raises:
        ValueError: If an object is of a class that is not among `classes`.
    """
    indices = np.array([classes.index(name) if name in classes else -1 for name in names], dtype=np.int64)
    mapped = []
    for image in images:
        labels = indices[image.labels]
        if (labels < 0).any():
            name = names[image.labels[labels < 0][0]]
            raise ValueError(
                f"{image.file} has an object of class {name!r}, which the images to train on do not have: they have "
                f"{', '.join(classes)}."
            )
        mapped.append(replace(image, labels=labels))
    return mapped


def spread(images: list[AnnotatedImage], limit: int | None) -> list[AnnotatedImage]:
    """At most `limit` images from all over the split."""
    if limit is None or limit >= len(images):
        return images
    return [images[index] for index in np.linspace(0, len(images) - 1, limit).astype(int)]


def digest(splits: Splits, classes: Sequence[str]) -> str:
    """Tells data sets apart by all their boxes and some of their images."""
    sha = hashlib.sha256(repr(classes).encode())
    for name, images in splits.items():
        for image in images:
            sha.update(repr((name, image.file.name, image.width, image.height)).encode())
            for array in (image.boxes, image.labels, image.crowd):
                sha.update(array.tobytes())
        for image in spread(images, SAMPLED_IMAGES):
            sha.update(image.file.read_bytes())
    return sha.hexdigest()[:16]
