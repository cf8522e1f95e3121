"""Reading annotations in the format of Pascal VOC: one XML file for each image."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from detection_images import AnnotatedImage


def list_file(split: Path) -> Path:
    """`FOLDER/NAME` -> `FOLDER/ImageSets/Main/NAME.txt`, the names of the images of a split."""
    return split.parent / "ImageSets" / "Main" / f"{split.name}.txt"


def splits_in(folder: Path) -> list[str]:
    """Names of the splits of a folder, but for those of single classes (`cat_train`)."""
    return sorted(file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt") if "_" not in file.stem)


def read_split(split: Path) -> tuple[tuple[str, ...], list[AnnotatedImage]]:
    """Class names in alphabetical order, and the images of a split.

    Raises:
        ValueError: If files are missing, or an annotation lacks something.
    """
    names = [line.split()[0] for line in list_file(split).read_text(encoding="utf-8").splitlines() if line.strip()]
    parsed = [_parse(split.parent / "Annotations" / f"{name}.xml") for name in names]
    classes = tuple(sorted({name for _, objects in parsed for name, _, _ in objects}))
    indices = {name: index for index, name in enumerate(classes)}
    images = []
    for (file, size), objects in parsed:
        boxes, crowd = [box for _, box, _ in objects], [difficult for _, _, difficult in objects]
        images.append(AnnotatedImage.of(file, size, boxes, [indices[name] for name, _, _ in objects], crowd))
    return classes, images


Object = tuple[str, tuple[float, ...], bool]


def _parse(file: Path) -> tuple[tuple[Path, tuple[int, int]], list[Object]]:
    """Image file and size, and for each object its class, box, and whether it is difficult."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist, but its image is in the list of the split.")
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is no XML file: {error}.") from error
    image = file.parents[1] / "JPEGImages" / _text(root, "filename", file)
    if not image.is_file():
        raise ValueError(f"{file} names the image {image.name}, which is not in {image.parent}.")
    size = int(_text(root, "size/width", file)), int(_text(root, "size/height", file))
    return (image, size), [_object(one, file) for one in root.findall("object")]


def _object(element: ElementTree.Element, file: Path) -> Object:
    """Pixels are counted from 1 and belong to the box: it begins one before the first."""
    x1, y1, x2, y2 = (float(_text(element, f"bndbox/{name}", file)) for name in ("xmin", "ymin", "xmax", "ymax"))
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return _text(element, "name", file), (x1 - 1, y1 - 1, x2, y2), difficult


def _text(element: ElementTree.Element, path: str, file: Path) -> str:
    text = element.findtext(path)
    if text is None or not text.strip():
        raise ValueError(
            f"{file} has no {path} in its <{element.tag}>: expected annotations in the format of Pascal VOC."
        )
    return text.strip()
