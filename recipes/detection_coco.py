"""Reading annotations in the format of COCO: one JSON file for all images of a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detection_images import AnnotatedImage


def annotation_file(split: Path) -> Path:
    """`FOLDER/NAME` -> `FOLDER/annotations/instances_NAME.json`; the images lie in `FOLDER/NAME` itself."""
    return split.parent / "annotations" / f"instances_{split.name}.json"


def splits_in(folder: Path) -> list[str]:
    """Names of the splits of a folder."""
    return sorted(file.stem.removeprefix("instances_") for file in (folder / "annotations").glob("instances_*.json"))


def read_split(split: Path) -> tuple[tuple[str, ...], list[AnnotatedImage]]:
    """Class names in the order of their ids, and the images of a split, also those without objects.

    Raises:
        ValueError: If files are missing, or the annotations name images or categories that there are not.
    """
    file = annotation_file(split)
    content = _read(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    indices = {category["id"]: index for index, category in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        _check(annotation, file, objects, indices)
        objects[annotation["image_id"]].append(annotation)
    images = []
    for image in content["images"]:
        path = split / image["file_name"]
        if not path.is_file():
            raise ValueError(f"{file} names the image {image['file_name']}, which is not in {split}.")
        found = objects[image["id"]]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in found)]
        labels = [indices[one["category_id"]] for one in found]
        crowd = [bool(one.get("iscrowd", 0)) for one in found]
        images.append(AnnotatedImage.of(path, (image["width"], image["height"]), boxes, labels, crowd))
    return tuple(category["name"] for category in categories), images


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}.") from error
    missing = [name for name in ("images", "annotations", "categories") if name not in content]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}: expected annotations in the format of COCO.")
    return content


def _check(annotation: dict[str, Any], file: Path, images: dict[int, Any], categories: dict[int, int]) -> None:
    what = f"annotation {annotation.get('id', annotation)} in {file}"
    for name, known in (("image_id", images), ("category_id", categories)):
        if annotation.get(name) not in known:
            raise ValueError(f"{what} has the {name} {annotation.get(name)}, which the file does not define.")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{what} has the bbox {box}: expected [x, y, width, height].")
