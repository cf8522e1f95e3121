"""The data of `embedder.py`: sentences to learn from, and the pairs of STS-B that embeddings are judged by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset, DatasetDict
from glue_tasks import HUB_DATASET, TASKS, get_task, load_task
from recipe_task import Task

JUDGE = "stsb"
"""The task whose validation pairs come with how similar people find them."""

SOURCES = tuple(name for name, task in TASKS.items() if task.hub_dataset is not None)
"""GLUE tasks with training sentences."""


@dataclass(frozen=True, kw_only=True)
class EmbedderTask(Task):
    """To give sentences the embeddings that the teacher gives them.

    Attributes:
        max_length: Tokens after which a sentence is cut.
        batch_size: Sentences per step.
        student_learning_rate: For the latent weights of the 1-bit student.
        student_epochs: For the distillation.
    """

    name: str = "embedder"
    title: str = "GLUE stsb"
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("spearman_cosine", "pearson_cosine")
    main_metric: str = "spearman_cosine"
    language: str | None = "en"
    hub_dataset: str | None = HUB_DATASET
    hub_config: str | None = JUDGE
    max_length: int = 128
    batch_size: int = 32
    student_learning_rate: float = 1e-3
    student_epochs: int = 8
    sentence_columns: ClassVar[tuple[str, ...]] = ("sentence1",)


def load_data(tasks: Sequence[str], data_dir: str | None, train_file: str | None) -> DatasetDict:
    """Loads sentences without labels as the split `train`, and the pairs of STS-B with theirs as `validation`.

    Args:
        tasks: GLUE tasks whose training sentences are taken, if there is no `train_file`.
        data_dir: The folder with the GLUE files; None loads from the Hub.
        train_file: A text file with a sentence per line.

    Raises:
        ValueError: If the Hub cannot be reached, a file has not the layout of its task, or there are no sentences.
        FileNotFoundError: If a file does not exist.
    """
    validation = load_task(JUDGE, data_dir)["validation"]
    found = glue_sentences(tasks, data_dir) if train_file is None else file_sentences(Path(train_file))
    return DatasetDict(train=Dataset.from_dict({"sentence1": distinct(found)}), validation=validation)


def glue_sentences(tasks: Sequence[str], data_dir: str | None) -> Iterator[str]:
    """The training sentences of GLUE tasks, the first and the second ones."""
    for name in tasks:
        train = load_task(name, data_dir)["train"]
        for column in get_task(name).sentence_columns:
            yield from train[column]


def file_sentences(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it has no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--train_file {path} does not exist")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--train_file {path} is no text in UTF-8: {error}") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"--train_file {path} has no sentences: it should have one per line")
    return lines


def distinct(sentences: Iterable[str]) -> list[str]:
    """Each sentence once, where it comes first; without empty ones."""
    return list(dict.fromkeys(filter(None, map(str.strip, sentences))))
