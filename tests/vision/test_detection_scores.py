"""Mean average precision against numbers worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("datasets", reason="needs the extra rebnn_hf[recipes]")

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from detection_images import AnnotatedImage
from detection_scores import score

CLASSES = ("cat", "dog", "ghost")
SQUARE, FAR = [0, 0, 100, 100], [300, 300, 340, 340]


def image(*objects):
    """An image with (box, label, crowd) on it."""
    boxes, labels, crowd = zip(*objects, strict=True) if objects else ((), (), ())
    return AnnotatedImage.of(Path("none"), (400, 400), boxes, labels, crowd)


def found(*objects):
    """(box, label, score) that a model found."""
    boxes, labels, scores = zip(*objects, strict=True) if objects else ((), (), ())
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": np.array(labels, dtype=np.int64), "scores": np.array(scores, dtype=np.float32)}


def test_a_number_worked_out_by_hand():
    """Two cats. The best detection is exact, the next is on nothing, the third overlaps by 0.77.

    Precision is taken at the recalls 0, 0.01, ..., 1. Up to 0.5 (51 of 101) it is 1; beyond, it is 2 of 3 where 0.77 is
    enough (overlaps 0.50 to 0.75, 6 of 10), else 0.
    """
    images = [image((SQUARE, 0, False)), image((SQUARE, 0, False))]
    detections = [found((SQUARE, 0, 0.9), (FAR, 0, 0.8)), found(([0, 0, 100, 77], 0, 0.7))]
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    scores = score(images, detections, CLASSES)
    assert scores.means == pytest.approx({"mAP": 0.6 * loose + 0.4 * strict, "AP50": loose, "AP75": loose})
    assert scores.by_class == {"cat": pytest.approx(scores.means["mAP"])}


def test_the_mean_is_over_classes_that_there_are():
    """All cats are found, no dog is; of ghosts there are none, and what is found of them counts nothing."""
    images = [image((SQUARE, 0, False), (FAR, 1, False))]
    scores = score(images, [found((SQUARE, 0, 0.6), (SQUARE, 2, 0.9))], CLASSES)
    assert scores.by_class == {"cat": pytest.approx(1), "dog": 0}
    assert scores.means == pytest.approx({"mAP": 0.5, "AP50": 0.5, "AP75": 0.5})


def test_crowds_and_difficult_objects_count_neither_way():
    images = [image((SQUARE, 0, False), (FAR, 0, True))]
    twice = found((SQUARE, 0, 0.6), (FAR, 0, 0.9), (FAR, 0, 0.8))
    for detections in (twice, found((SQUARE, 0, 0.6))):
        assert score(images, [detections], CLASSES).means["mAP"] == pytest.approx(1)
    assert score([image((SQUARE, 0, False))], [twice], CLASSES).means["mAP"] == pytest.approx(1 / 3)


def test_nothing_found_and_nothing_to_find():
    images = [image((SQUARE, 0, False)), image()]
    assert score(images, [found(), found()], CLASSES).means == {"mAP": 0, "AP50": 0, "AP75": 0}
    with pytest.raises(ValueError, match="2 images and detections for 1"):
        score(images, [found()], CLASSES)
    with pytest.raises(ValueError, match="no objects: there is nothing to score"):
        score([image((SQUARE, 0, True))], [found()], CLASSES)
