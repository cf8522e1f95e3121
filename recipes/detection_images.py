"""An image with its boxes, as every format of `detection_data.py` gives it, and its way into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_transforms import seeded
from PIL import Image

TOLERANCE = 1.0  # pixels by which rounding may put a box outside of its image


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file and what is to be found on it.

    Attributes:
        file: Where the image lies.
        width: Of the image in pixels.
        height: Of the image in pixels.
        boxes: [B, 4] in pixels, x1, y1, x2, y2; float32.
        labels: [B] indices of classes.
        crowd: [B] whether a box stands for several objects (COCO) or a difficult one (VOC): nothing is learned from it,
            and a detection on it counts neither as right nor as wrong.
    """

    file: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    @classmethod
    def of(
        cls, file: Path, size: tuple[int, int], boxes: Sequence, labels: Sequence[int], crowd: Sequence[bool]
    ) -> AnnotatedImage:
        """An image of a size (width, height) with lists of boxes, labels and crowds, which may be empty."""
        arrays = (
            np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
            np.asarray(labels, dtype=np.int64),
            np.asarray(crowd, dtype=bool),
        )
        return cls(file, *size, *arrays)

    def keep(self, chosen: np.ndarray) -> AnnotatedImage:
        """The image with some of its boxes only."""
        return replace(self, boxes=self.boxes[chosen], labels=self.labels[chosen], crowd=self.crowd[chosen])

    def pixels(self) -> torch.Tensor:
        """The image in colour, [3, H, W] with values from 0 to 1.

        Raises:
            ValueError: If it has not the size that its boxes were drawn for.
        """
        with Image.open(self.file) as image:
            if image.size != (self.width, self.height):
                raise ValueError(
                    f"{self.file} is {image.size[0]} x {image.size[1]} pixels, but its annotations are for "
                    f"{self.width} x {self.height}."
                )
            values = np.array(image.convert("RGB"), dtype=np.float32)
        return torch.from_numpy(values).permute(2, 0, 1) / 255


def with_good_boxes(images: Sequence[AnnotatedImage], skip_bad: bool) -> list[AnnotatedImage]:
    """The images with boxes that lie on them: what rounding put beyond the border is cut off.

    Args:
        images: As they were read.
        skip_bad: Leave out boxes that are empty or leave the image, in place of refusing them.

    Raises:
        ValueError: If there are such boxes, and they are not to be left out.
    """
    checked, bad, first = [], 0, ""
    for image in images:
        limits = np.array([image.width, image.height] * 2, dtype=np.float32)
        boxes = image.boxes.clip(0, limits)
        good = (np.abs(boxes - image.boxes) <= TOLERANCE).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        if not good.all():
            first = first or f"{image.boxes[~good][0].tolist()} in {image.file}, {image.width} x {image.height} pixels"
            bad += int((~good).sum())
        checked.append(replace(image, boxes=boxes).keep(good))
    if bad and not skip_bad:
        raise ValueError(
            f"{bad} boxes are empty or leave their image (first: {first}): correct them, or leave them out with "
            "--skip_bad_boxes."
        )
    return checked


def flipped(pixels: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [3, H, W] and its boxes [B, 4], left and right exchanged."""
    width = pixels.shape[-1]
    return pixels.flip(-1), torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)


class TrainingDetections(torch.utils.data.Dataset):
    """`pixel_values` and `labels` of images, half of them flipped: a function of seed, epoch and index alone."""

    def __init__(self, images: Sequence[AnnotatedImage], seed: int):
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, Any]:
        epoch, index = epoch_and_index
        image = self.images[index]
        image = image.keep(~image.crowd)
        pixels, boxes = image.pixels(), torch.from_numpy(image.boxes)
        with seeded(self.seed, epoch, index):
            if torch.rand(()) < 0.5:
                pixels, boxes = flipped(pixels, boxes)
        return {"pixel_values": pixels, "labels": {"boxes": boxes, "class_labels": torch.from_numpy(image.labels)}}


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, list]:
    """A batch of images of any sizes: lists of what the examples have."""
    return {name: [example[name] for example in examples] for name in examples[0]}
