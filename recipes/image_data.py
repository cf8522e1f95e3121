"""The data of `image_classification.py`: scikit-learn's digits, a folder of images, or a data set on the Hub.

Whatever the source, a loaded data set has the splits `train` and `validation` with the columns `image` and `label`, a
class id of a `ClassLabel` feature.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL.Image import fromarray
from recipe_task import Task
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

VALIDATION = ("validation", "val", "test")  # what the split to evaluate on may be called, in order of preference
DIGITS_HELD_OUT = 360  # for validation, a fifth
MANY_CLASSES = 10  # with more of them the best five count too
SAMPLED_IMAGES = 256  # tell whether two runs saw the same data


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Images of one class each, and how to train on them by default.

    Attributes:
        image_size: Side of the images that the models see; None: that of the teacher.
        crop_pct: Share of the image's side that is evaluated; None: that of the teacher.
        teacher_model: The float model.
        teacher_learning_rate: For its training.
        teacher_epochs: For its training.
        batch_size: Images per step.
        stage_one_learning_rate: With float weights and 1-bit activations.
        stage_one_epochs: With float weights and 1-bit activations.
        learning_rate: With 1-bit weights too.
        epochs: With 1-bit weights too.
        logging_steps: Steps between log lines.
    """

    image_size: int | None = None
    crop_pct: float | None = None
    teacher_model: str
    teacher_learning_rate: float
    teacher_epochs: float
    batch_size: int
    stage_one_learning_rate: float
    stage_one_epochs: float
    learning_rate: float
    epochs: float
    logging_steps: int


PAPER = {  # A8 of the methods, with the teacher of ReActNet and ReBNN
    "teacher_model": "timm/resnet34.a1_in1k",
    "teacher_learning_rate": 1e-4,
    "teacher_epochs": 10,
    "batch_size": 512,
    "stage_one_learning_rate": 2.5e-3,
    "stage_one_epochs": 128,
    "learning_rate": 1e-3,
    "epochs": 256,
    "logging_steps": 500,
}
DIGITS = {  # minutes on one core
    "image_size": 32,
    "crop_pct": 1.0,
    "teacher_model": "resnet18",
    "teacher_learning_rate": 1e-3,
    "teacher_epochs": 5,
    "batch_size": 64,
    "stage_one_learning_rate": 2e-3,
    "stage_one_epochs": 5,
    "learning_rate": 1e-3,
    "epochs": 8,
    "logging_steps": 10,
}


def load_images(
    name: str, data_dir: str | None, image_column: str | None = None, label_column: str | None = None
) -> tuple[ImageTask, DatasetDict]:
    """The images of a folder if one is named, otherwise `digits` or a data set on the Hub.

    Raises:
        ValueError: If there are no images with classes to be had.
    """
    if data_dir is not None:
        name, data = Path(data_dir).resolve().name, load_folder(Path(data_dir))
    elif name == "digits":
        data = digits()
    else:
        data = load_hub(name, image_column, label_column)
    labels = tuple(data["train"].features["label"].names)
    task = ImageTask(
        name=Path(name).name,
        title=name,
        labels=labels,
        metrics=("accuracy", "top5_accuracy") if len(labels) > MANY_CLASSES else ("accuracy",),
        main_metric="accuracy",
        hub_dataset=name if data_dir is None and name != "digits" else None,
        **(DIGITS if name == "digits" and data_dir is None else PAPER),
    )
    return task, data


def digits() -> DatasetDict:
    """1797 handwritten digits of 8x8 pixels (UCI, by way of scikit-learn, which brings them along)."""
    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in source.target_names])})
    parts = train_test_split(pixels, source.target, test_size=DIGITS_HELD_OUT, stratify=source.target, random_state=0)
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": [fromarray(image) for image in images], "label": labels}, features)
            for name, images, labels in (("train", *parts[::2]), ("validation", *parts[1::2]))
        }
    )


def load_folder(folder: Path) -> DatasetDict:
    """Images in `train/CLASS/` and `validation/CLASS/` (or `val`, `test`).

    Raises:
        ValueError: If there are no such folders, or no images in them.
    """
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    validation = next((name for name in VALIDATION if name in found), None)
    if "train" not in found or validation is None:
        raise ValueError(
            f"--data_dir {folder} has the folders {', '.join(found) or 'none'}: expected train and one of "
            f"{', '.join(VALIDATION)}, each with a folder of images for every class."
        )
    files = {"train": str(folder / "train" / "**"), "validation": str(folder / validation / "**")}
    try:
        data = load_dataset("imagefolder", data_files=files, drop_labels=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"--data_dir {folder} holds no images that can be read: {first_line(error)}") from error
    return in_our_columns(data, str(folder))


def load_hub(name: str, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Images of a data set on the Hub; the columns need names where there are several of a kind.

    Raises:
        ValueError: If it cannot be loaded, or holds no images with classes.
    """
    try:
        data = load_dataset(name)
    except (ValueError, OSError) as error:  # the Hub's errors are OSErrors
        raise ValueError(
            f"--dataset {name} cannot be loaded from the Hub ({first_line(error)}): pass --data_dir FOLDER, or "
            "--dataset digits."
        ) from error
    validation = next((split for split in VALIDATION if split in data), None)
    if "train" not in data or validation is None:
        raise ValueError(f"{name} has the splits {', '.join(data)}: expected train and one of {', '.join(VALIDATION)}.")
    return in_our_columns(
        DatasetDict(train=data["train"], validation=data[validation]), name, image_column, label_column
    )


def in_our_columns(
    data: DatasetDict, source: str, image_column: str | None = None, label_column: str | None = None
) -> DatasetDict:
    """The data with its column of images called `image` and its column of classes called `label`.

    Raises:
        ValueError: If a column that was named is none of its kind, or there is not exactly one where none was named.
    """
    features = data["train"].features
    columns = {}
    for name, kind, chosen in (("image", Image, image_column), ("label", ClassLabel, label_column)):
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if chosen is not None and chosen not in found:
            raise ValueError(
                f"--{name}_column {chosen} is no column of type {kind.__name__} in {source}; these are: "
                f"{', '.join(found) or 'none'}."
            )
        if chosen is None and len(found) != 1:
            raise ValueError(
                f"{source} has {len(found)} columns of type {kind.__name__} (all columns: {', '.join(features)}): "
                f"expected one, with one class for each image; --{name}_column says which."
            )
        columns[chosen or found[0]] = name
    return data.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})


def spread(split: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows from all over the split: folders are sorted by class."""
    if limit is None or limit >= len(split):
        return split
    return split.select(np.linspace(0, len(split) - 1, limit).astype(int))


def digest_images(data: DatasetDict) -> str:
    """Tells data sets apart by all their labels and some of their images: reading all would take hours."""
    sha = hashlib.sha256()
    for name, split in data.items():
        sha.update(repr((name, split.features["label"].names, split["label"][:])).encode())
        for image in spread(split, SAMPLED_IMAGES)["image"]:
            sha.update(image.tobytes())
    return sha.hexdigest()[:16]


def first_line(error: Exception) -> str:
    """What an error says, short."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
