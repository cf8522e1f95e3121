"""The data of `squad.py`: SQuAD v1.1 from the Hub, or JSON files in its original form.

Either way a question is a row with `id`, `question`, `context` and `answers`: the texts that count as correct and where
in the context, in characters, each begins.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from recipe_task import TextTask

HUB_DATASET = "rajpurkar/squad"
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SquadTask(TextTask):
    """Questions whose answers are spans of a text."""

    name: str = "squad"
    title: str
    labels: tuple[str, ...] = ("start", "end")
    metrics: tuple[str, ...] = ("exact_match", "f1")
    main_metric: str = "f1"


# Batches, teacher's rate and epochs as in the BERT paper's range; the student's as for GLUE's large tasks.
_TRAINING = {
    "max_length": 384,
    "batch_size": 32,
    "teacher_learning_rate": 5e-5,
    "teacher_epochs": 2,
    "student_learning_rate": 1e-3,
    "student_epochs": 2,
}
SQUAD = SquadTask(title="SQuAD v1.1", language="en", hub_dataset=HUB_DATASET, hub_config="plain_text", **_TRAINING)


def custom_task(validation_file: str | Path) -> SquadTask:
    """Describes questions from files: they may be SQuAD's or one's own."""
    return SquadTask(title=Path(validation_file).stem, **_TRAINING)


def load_hub() -> DatasetDict:
    """Loads SQuAD v1.1.

    Raises:
        ValueError: If the Hub cannot be reached.
    """
    try:
        dataset = load_dataset(HUB_DATASET)
    except ConnectionError as error:
        raise ValueError(
            f"{HUB_DATASET} cannot be downloaded without a connection to the Hub: pass --train_file "
            "train-v1.1.json and --validation_file dev-v1.1.json"
        ) from error
    return checked({split: (HUB_DATASET, rows.to_list()) for split, rows in dataset.items()})


def load_files(train_file: str | Path, validation_file: str | Path) -> DatasetDict:
    """Loads files in the form of `train-v1.1.json`: articles, their paragraphs, questions on these, answers.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file has another form, or a question no answer.
    """
    paths = {"train": Path(train_file), "validation": Path(validation_file)}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
    return checked({split: (str(path), read_squad(path)) for split, path in paths.items()})


def read_squad(path: Path) -> list[Row]:
    """The questions of a file, in its order."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    return list(_questions(content, str(path)))


def _questions(content: Any, place: str) -> Iterator[Row]:
    for article, article_place in _entries(content, "data", place):
        for paragraph, paragraph_place in _entries(article, "paragraphs", article_place):
            context = _entry(paragraph, "context", str, paragraph_place)
            for question, question_place in _entries(paragraph, "qas", paragraph_place):
                yield {
                    "id": _entry(question, "id", str, question_place),
                    "question": _entry(question, "question", str, question_place),
                    "context": context,
                    "answers": _answers(question, question_place),
                }


def _answers(question: Any, place: str) -> dict[str, list]:
    answers = list(_entries(question, "answers", place))
    return {
        "text": [_entry(answer, "text", str, where) for answer, where in answers],
        "answer_start": [_entry(answer, "answer_start", int, where) for answer, where in answers],
    }


def _entries(parent: Any, name: str, place: str) -> Iterator[tuple[Any, str]]:
    """The items of a list in the file, each with the place where it was found."""
    for number, item in enumerate(_entry(parent, name, list, place)):
        yield item, f"{place}, {name}[{number}]"


def _entry(parent: Any, name: str, kind: type, place: str) -> Any:
    value = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place}: expected {kind.__name__} {name!r} as in train-v1.1.json, found {_shortened(value)}")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def checked(splits: dict[str, tuple[str, list[Row]]]) -> DatasetDict:
    """Makes data sets of the rows of each split, which came from the named source.

    A training question whose first answer is not in the context where it should be is left out; a warning counts them.

    Raises:
        ValueError: If there are no questions, an id occurs twice, or a question has no answer.
    """
    dataset = DatasetDict()
    for split, (source, rows) in splits.items():
        _check_questions(source, rows)
        kept = _located(source, rows) if split == "train" else rows
        dataset[split] = Dataset.from_list([{name: row[name] for name in FEATURES} for row in kept], features=FEATURES)
    return dataset


def _check_questions(source: str, rows: list[Row]) -> None:
    if not rows:
        raise ValueError(f"{source} has no questions")
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"{source}: the id {row['id']!r} occurs twice; predictions.json needs unique ones")
        seen.add(row["id"])
        if not any(text.strip() for text in row["answers"]["text"]):
            raise ValueError(
                f"{source}: the question {row['id']!r} has no answer; leave out what the text does not answer "
                "(this is SQuAD v1.1, not v2)"
            )


def _located(source: str, rows: list[Row]) -> list[Row]:
    kept = [row for row in rows if _is_located(row)]
    if len(kept) < len(rows):
        lost = next(row for row in rows if not _is_located(row))
        text, start = lost["answers"]["text"][0], lost["answers"]["answer_start"][0]
        message = (
            f"{source}: left out {len(rows) - len(kept)} of {len(rows)} questions, whose answer is not where "
            f"answer_start says (the first is {lost['id']!r}: expected {text!r} at character {start})"
        )
        if not kept:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return kept


def _is_located(row: Row) -> bool:
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    return bool(text.strip()) and start >= 0 and row["context"].startswith(text, start)
