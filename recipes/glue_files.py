"""Data of one's own for `glue.py`: CSV, TSV and JSON files in the form of a GLUE task."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from glue_tasks import CORRELATIONS, PAIR, GlueTask, define, number_in

SHOWN_LABELS = 10  # on the console


def load_files(train_file: str | Path, validation_file: str | Path, test_file: str | Path | None = None) -> DatasetDict:
    """Loads labelled sentences, or pairs, from .csv, .tsv, .json (a list of objects) or .jsonl files.

    The first sentence is in the column `sentence1`, `sentence` or `text`, an optional second one in
    `sentence2`, the label in `label`; other columns are ignored. The labels of the training file decide the
    kind of task: whole numbers and words are classes, with ids in sorted order; numbers of which some have a
    decimal point mean regression. CSV files follow the usual quoting; in TSV files, as in GLUE's, quotes are
    ordinary text.

    Args:
        train_file: For training.
        validation_file: For evaluation; in classification, its labels must occur in the training file.
        test_file: For predictions; its label column is optional.

    Returns:
        The splits `train`, `validation` and, if given, `test`, with the row number (from 0) as its `index`.
        `custom_task` derives the task from it.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file has another extension, lacks a column, or has malformed rows or unknown labels.
    """
    paths = {"train": Path(train_file), "validation": Path(validation_file)}
    if test_file is not None:
        paths["test"] = Path(test_file)
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
    tables = {split: _read_table(path) for split, path in paths.items()}
    sentence_columns = [column for column in PAIR if column in tables["train"]]
    _check_columns(tables, paths, sentence_columns)

    label_names = _label_names(tables["train"]["label"], paths["train"])
    splits = DatasetDict()
    for split, table in tables.items():
        data: dict[str, list] = {column: table[column] for column in sentence_columns}
        features = {column: Value("string") for column in sentence_columns}
        if "label" in table:
            data["label"] = _encode_labels(table["label"], label_names, paths[split], paths["train"])
            features["label"] = Value("float32") if label_names is None else ClassLabel(names=label_names)
        if split == "test":
            data["index"] = list(range(len(data["sentence1"])))
            features["index"] = Value("int64")
        splits[split] = Dataset.from_dict(data, features=Features(features))
    return splits


def custom_task(dataset: DatasetDict) -> GlueTask:
    """Describes what `load_files` has loaded: a task named `custom`."""
    features = dataset["train"].features
    sentences = [column for column in PAIR if column in features]
    if isinstance(features["label"], ClassLabel):
        return define("custom", sentences, features["label"].names, ["accuracy"], text_labels=True)
    return define("custom", sentences, None, CORRELATIONS)


def describe(task: GlueTask) -> str:
    """What was made of files of one's own, in a line for the console."""
    read = "pairs of sentences" if len(task.sentences) > 1 else "single sentences"
    if task.is_regression:
        return f"{task.name}: {read}, a number for each (regression)"
    names = ", ".join(task.labels[:SHOWN_LABELS]) + (", ..." if len(task.labels) > SHOWN_LABELS else "")
    return f"{task.name}: {read}, {len(task.labels)} classes ({names})"


def _read_table(path: Path) -> dict[str, list]:
    """Reads a file into columns, with the first sentence column under the name `sentence1`."""
    if path.suffix not in _READERS:
        raise ValueError(f"{path} has the extension {path.suffix!r}: expected one of {', '.join(_READERS)}")
    records = list(_READERS[path.suffix](path))
    if not records:
        raise ValueError(f"{path} has no rows")
    first = next((name for name in ("sentence1", "sentence", "text") if name in records[0]), None)
    if first is None:
        found = ", ".join(map(str, records[0]))
        raise ValueError(f"{path} has no column sentence1, sentence or text; found {found}")
    wanted = {"sentence1": first, "sentence2": "sentence2", "label": "label"}
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs in records[0]}
    table: dict[str, list] = {ours: [] for ours in wanted}
    for row, record in enumerate(records, start=1):
        for ours, theirs in wanted.items():
            value = record.get(theirs)
            if value is None or (ours != "label" and not isinstance(value, str)):
                kind = "a value" if ours == "label" else "a text"
                raise ValueError(f"{path}, row {row}: expected {kind} in column {theirs!r}, found {value!r}")
            table[ours].append(value)
    return table


def _read_csv(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_plain_tsv(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        for line in file:
            # A short row lacks keys, which the caller reports with its row number.
            yield dict(zip(header, line.rstrip("\r\n").split("\t"), strict=False))


def _read_json(path: Path) -> Iterator[dict]:
    """Reads one list of objects, or (always for .jsonl, and recognised in .json) one object a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".json" and text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON list of objects nor one JSON object a line: {error}") from error
    for row, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {row}: expected an object, found {record!r}")
        yield record


_READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".csv": _read_csv,
    ".tsv": _read_plain_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
}


def _check_columns(tables: dict[str, dict], paths: dict[str, Path], sentence_columns: Sequence[str]) -> None:
    for split, table in tables.items():
        needed = [*sentence_columns] if split == "test" else [*sentence_columns, "label"]
        missing = [column for column in needed if column not in table]
        if missing:
            raise ValueError(f"{paths[split]} lacks the column {', '.join(missing)}")
        extra = [column for column in PAIR if column in table and column not in sentence_columns]
        if extra:
            raise ValueError(f"{paths[split]} has the column {', '.join(extra)}; {paths['train']} has not")


def _label_text(label: object) -> str:
    """Spells a label, with 1 and "1", and with 1.0 and "1.0", as the same one."""
    return str(label).strip()


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _label_names(labels: Sequence[object], path: Path) -> list[str] | None:
    """Returns the class names in the order of their ids, or None where the labels are floats."""
    texts = {_label_text(label) for label in labels}
    if all(_is_whole(text) for text in texts):
        names = sorted(texts, key=int)
    elif all(number_in(text) is not None for text in texts):
        return None
    else:
        names = sorted(texts)
    if len(names) < 2:
        raise ValueError(f"{path} has one label only, {names[0]!r}: nothing can be learned from it")
    return names


def _encode_labels(
    labels: Sequence[object], names: list[str] | None, path: Path, train_path: Path
) -> list[int] | list[float]:
    if names is None:
        scores = [number_in(label) for label in labels]
        if None in scores:
            row = scores.index(None)
            raise ValueError(f"{path}, row {row + 1}: expected a number as label, found {labels[row]!r}")
        return scores
    ids = {name: index for index, name in enumerate(names)}
    texts = [_label_text(label) for label in labels]
    unseen = sorted(set(texts) - ids.keys())
    if unseen:
        raise ValueError(f"{path} has labels that {train_path} has not: {', '.join(unseen)}")
    return [ids[text] for text in texts]
