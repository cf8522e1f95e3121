"""The embedded data of `detection.py`: coloured rectangles and discs on a noisy ground, in COCO's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from detection_coco import annotation_file
from PIL import Image, ImageDraw
from recipe_folder import write_json

CLASSES = ("disc", "rectangle")
COUNTS = {"train": 48, "val": 16}
SIDE = 96  # of an image in pixels
SMALLEST, LARGEST = 18, 44  # side of a shape
SEED = 0


def write_shapes(folder: Path) -> None:
    """Writes images and annotations of both splits, the same ones every time."""
    for number, (name, count) in enumerate(COUNTS.items()):
        split = folder / name
        split.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((SEED, number))
        images, annotations = [], []
        for index in range(count):
            picture, shapes = draw(rng)
            file = f"{index:02}.png"
            picture.save(split / file)
            images.append({"id": index, "file_name": file, "width": SIDE, "height": SIDE})
            for category, (x1, y1, x2, y2) in shapes:
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": category, **box})
        categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
        content: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
        write_json(annotation_file(split), content)


def draw(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image, and class and box of each of its one to three shapes, which do not touch."""
    picture = Image.fromarray(rng.integers(0, 70, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    shapes: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(rng.integers(1, 4)):
        category = int(rng.integers(len(CLASSES)))
        width, height = (int(side) for side in rng.integers(SMALLEST, LARGEST, 2))
        if CLASSES[category] == "disc":
            height = width
        x, y = int(rng.integers(0, SIDE - width)), int(rng.integers(0, SIDE - height))
        box = x, y, x + width, y + height
        if any(_touch(box, other) for _, other in shapes):
            continue
        color = tuple(int(value) for value in rng.integers(120, 256, 3))
        paint = pen.ellipse if CLASSES[category] == "disc" else pen.rectangle
        paint((x, y, x + width - 1, y + height - 1), fill=color)
        shapes.append((category, box))
    return picture, shapes


def _touch(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
