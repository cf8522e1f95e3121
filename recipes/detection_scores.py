"""Mean average precision as COCO defines it, by pycocotools, for images of any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import numpy as np
from detection_images import AnnotatedImage
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Detections = Mapping[str, np.ndarray]
"""What a model finds on one image: `boxes` [D, 4], `labels` [D], `scores` [D]."""

ALL_AREAS, MOST_DETECTIONS = 0, -1  # in the arrays of COCOeval: objects of all sizes, 100 detections for each image
AT_50, AT_75 = 0, 5  # of the overlaps 0.50, 0.55, ..., 0.95


@dataclass(frozen=True)
class Scores:
    """How good detections are.

    Attributes:
        means: `mAP` (mean over the classes and over overlaps from 0.50 to 0.95), `AP50` and `AP75`.
        by_class: Average precision, over the same overlaps, of each class of which there are objects.
    """

    means: dict[str, float]
    by_class: dict[str, float]


def score(images: Sequence[AnnotatedImage], detections: Sequence[Detections], classes: Sequence[str]) -> Scores:
    """Average precisions of detections, one entry for each image.

    Raises:
        ValueError: If there are no objects, or not as many detections as images.
    """
    if len(images) != len(detections):
        raise ValueError(f"there are {len(images)} images and detections for {len(detections)}: expected one for each.")
    if not any((~image.crowd).any() for image in images):
        raise ValueError("the images to evaluate on have no objects: there is nothing to score.")
    with redirect_stdout(StringIO()):  # pycocotools prints as it goes
        truth = _coco(images, classes, _objects(images))
        evaluation = COCOeval(truth, _coco(images, classes, _found(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., ALL_AREAS, MOST_DETECTIONS]  # overlaps, recalls, classes
    present = (precision >= 0).all((0, 1))  # -1 stands for classes without objects
    precision = precision[..., present]
    names = [name for name, there in zip(classes, present, strict=True) if there]
    means = {"mAP": precision.mean(), "AP50": precision[AT_50].mean(), "AP75": precision[AT_75].mean()}
    by_class = dict(zip(names, precision.mean((0, 1)).tolist(), strict=True))
    return Scores({name: float(value) for name, value in means.items()}, by_class)


def _coco(images: Sequence[AnnotatedImage], classes: Sequence[str], annotations: list[dict]) -> COCO:
    """COCO's own form of annotations; their ids begin with 1, as 0 stands for none in COCOeval."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index, "width": image.width, "height": image.height} for index, image in enumerate(images)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes)],
        "annotations": [{"id": index, **annotation} for index, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _objects(images: Sequence[AnnotatedImage]) -> list[dict]:
    return [
        {**_box(index, box, label), "iscrowd": int(crowd)}
        for index, image in enumerate(images)
        for box, label, crowd in zip(image.boxes, image.labels, image.crowd, strict=True)
    ]


def _found(detections: Sequence[Detections]) -> list[dict]:
    return [
        {**_box(index, box, label), "iscrowd": 0, "score": float(score)}
        for index, found in enumerate(detections)
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
    ]


def _box(image: int, box: np.ndarray, label: int) -> dict:
    x1, y1, x2, y2 = (float(value) for value in box)
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
    }
