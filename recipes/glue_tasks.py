"""The data of `glue.py`: the nine GLUE tasks and the embedded demo, all in one form.

Whatever the source (the Hub, the TSV files that gluebenchmark.com hands out, or, in `glue_files`, your own), a loaded
task has the columns `sentence1`, for pairs `sentence2`, and `label`: a class id of a `ClassLabel` feature, or
a float for regression. Rows of a test split have an `index` and, in GLUE, no label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from glue_grammar import LABELS as DEMO_LABELS, demo_dataset
from glue_tsv import read_tsv
from recipe_task import TextTask, TrainingDefaults

HUB_DATASET = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
DIAGNOSTIC_FILES = ("AX/AX.tsv", "diagnostic/diagnostic.tsv")  # of GLUE's AX, in the order they are looked for


# Small tasks get more epochs of distillation.
TRAINING: dict[str, TrainingDefaults] = {
    #                     length  batch  teacher lr  epochs  student lr  epochs
    "cola": TrainingDefaults( 64,    32,       5e-5,      4,       1e-3,      8),
    "sst2": TrainingDefaults( 64,    32,       5e-5,      3,       1e-3,      3),
    "mrpc": TrainingDefaults(128,    32,       5e-5,      4,       1e-3,      8),
    "stsb": TrainingDefaults(128,    32,       5e-5,      4,       1e-3,      6),
    "qqp":  TrainingDefaults(128,    32,       5e-5,      2,       1e-3,      2),
    "mnli": TrainingDefaults(128,    32,       5e-5,      2,       1e-3,      2),
    "qnli": TrainingDefaults(128,    32,       5e-5,      2,       1e-3,      2),
    "rte":  TrainingDefaults(128,    32,       5e-5,      4,       1e-3,      8),
    "wnli": TrainingDefaults(128,    32,       5e-5,      4,       1e-3,      8),
    "demo": TrainingDefaults( 32,    32,       5e-4,      5,       1e-3,      5),
    "custom": TrainingDefaults(128,  32,      5e-5,      3,       1e-3,      8),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GlueTask(TextTask):
    """One task of sentences or pairs: what its columns are and what its files look like.

    Attributes:
        sentences: The sentence columns, one or two, as the Hub's data set calls them.
        folder: The name of the task's folder among the original files; None if there are none.
        file_columns: The header names of the sentences in the original files, or their column numbers where
            there is no header.
        file_label: The same for the label.
        text_labels: Whether the original files and the submissions write label names instead of ids.
    """

    sentences: tuple[str, ...]
    folder: str | None = None
    file_columns: tuple[str, ...] | tuple[int, ...] = ()
    file_label: str | int = "label"
    text_labels: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts one number."""
        return self.labels is None

    @property
    def sentence_columns(self) -> tuple[str, ...]:
        """The sentence columns of the loaded data: `sentence1` and, for pairs, `sentence2`."""
        return PAIR[: len(self.sentences)]

    @property
    def metric_configuration(self) -> str:
        """The configuration of the metric module: the task, or the kind of custom task."""
        if self.name != "custom":
            return self.name
        return "regression" if self.is_regression else "classification"

    @property
    def features(self) -> Features:
        """The columns of a labelled split of the loaded data."""
        label = Value("float32") if self.labels is None else ClassLabel(names=list(self.labels))
        return Features({**{column: Value("string") for column in self.sentence_columns}, "label": label})


def define(
    name: str, sentences: Sequence[str], labels: Sequence[str] | None, metrics: Sequence[str], **files: object
) -> GlueTask:
    """Joins a line of the table below with its training defaults; the first metric is the main one."""
    on_hub = {"title": f"GLUE {name}", "hub_dataset": HUB_DATASET, "hub_config": name}
    return GlueTask(
        *astuple(TRAINING[name]),
        name=name,
        language=None if name == "custom" else "en",
        **(on_hub if "folder" in files else {"title": name}),
        sentences=tuple(sentences),
        labels=None if labels is None else tuple(labels),
        metrics=tuple(metrics),
        main_metric=metrics[0],
        **files,
    )


_ENTAILMENT = ("entailment", "not_entailment")
CORRELATIONS = ("pearson", "spearmanr")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        define("cola", ["sentence"], ["unacceptable", "acceptable"], ["matthews_correlation"],
              folder="CoLA", file_columns=(3,), file_label=1),
        define("sst2", ["sentence"], ["negative", "positive"], ["accuracy"],
              folder="SST-2", file_columns=("sentence",)),
        define("mrpc", PAIR, ["not_equivalent", "equivalent"], ["accuracy", "f1"],
              folder="MRPC", file_columns=("#1 String", "#2 String"), file_label="Quality"),
        define("stsb", PAIR, None, CORRELATIONS,
              folder="STS-B", file_columns=PAIR, file_label="score"),
        define("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"], ["accuracy", "f1"],
              folder="QQP", file_columns=("question1", "question2"), file_label="is_duplicate"),
        define("mnli", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], ["accuracy"],
              folder="MNLI", file_columns=PAIR, file_label="gold_label", text_labels=True),
        define("qnli", ["question", "sentence"], _ENTAILMENT, ["accuracy"],
              folder="QNLI", file_columns=("question", "sentence"), text_labels=True),
        define("rte", PAIR, _ENTAILMENT, ["accuracy"],
              folder="RTE", file_columns=PAIR, text_labels=True),
        define("wnli", PAIR, ["not_entailment", "entailment"], ["accuracy"],
              folder="WNLI", file_columns=PAIR),
        define("demo", ["sentence1"], DEMO_LABELS, ["accuracy"]),
    )
}  # fmt: skip


def get_task(name: str) -> GlueTask:
    """Looks a task up.

    Raises:
        ValueError: If there is none of that name; the message lists them all.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name: str, data_dir: str | Path | None = None) -> DatasetDict:
    """Loads a task of `TASKS`.

    Args:
        name: The task.
        data_dir: The folder with the original TSV files, or the folder that holds the folders CoLA, SST-2,
            MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI (and, beside MNLI, AX or diagnostic). None loads from the
            Hub. The demo needs neither.

    Returns:
        The splits `train`, `validation` and, where the source has it, `test`; MNLI's are the matched ones,
        next to `validation_mismatched`, `test_mismatched` and, where the source has it, `test_diagnostic`: GLUE's
        set AX, which has no training data and is answered by MNLI's model.

    Raises:
        ValueError: If the task is unknown, the Hub cannot be reached, or a file has not the task's layout.
        FileNotFoundError: If `data_dir` lacks a file that the task needs.
    """
    task = get_task(name)
    if task.name == "demo":
        return demo_dataset()
    if data_dir is None:
        return _load_from_hub(task)
    return _load_from_folder(task, _task_folder(task, Path(data_dir)))


# -------------------------------------------------------------------------------------------------------- Hub


def _load_from_hub(task: GlueTask) -> DatasetDict:
    try:
        dataset = load_dataset(HUB_DATASET, task.name)
        if task.name == "mnli":
            dataset["test_diagnostic"] = load_dataset(HUB_DATASET, "ax", split="test")
    except ConnectionError as error:
        raise ValueError(
            f"{HUB_DATASET} cannot be downloaded for task {task.name} without a connection to the Hub: pass "
            "--data_dir FOLDER with the GLUE files, or use --task demo, which needs no data"
        ) from error
    return unify_hub_columns(task, dataset)


def unify_hub_columns(task: GlueTask, dataset: DatasetDict) -> DatasetDict:
    """Gives the Hub's splits and columns (`validation_matched`, `premise`, `idx`) the names used here."""
    splits = DatasetDict()
    for split, rows in dataset.items():
        rows = rows.rename_columns(dict(zip(task.sentences, task.sentence_columns, strict=True)))
        if split.startswith("test"):  # its labels are all -1: hidden
            rows = rows.rename_column("idx", "index")
            columns = [*task.sentence_columns, "index"]
        else:
            columns = [*task.sentence_columns, "label"]
        splits[split.removesuffix("_matched")] = rows.select_columns(columns)
    return splits


# ----------------------------------------------------------------------------------------- original TSV files


def _task_folder(task: GlueTask, data_dir: Path) -> Path:
    """Returns `data_dir/CoLA` where it exists; otherwise `data_dir` itself is taken for the task's folder."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir {data_dir} is not a folder")
    if (data_dir / task.folder).is_dir():
        return data_dir / task.folder
    if (data_dir / "train.tsv").is_file():
        return data_dir
    raise FileNotFoundError(
        f"task {task.name} needs {data_dir / task.folder / 'train.tsv'} or {data_dir / 'train.tsv'}: neither exists"
    )


def _split_files(task: GlueTask) -> dict[str, str]:
    """Returns the file of each split; the test files are optional."""
    if task.name == "mnli":
        return {
            "train": "train.tsv",
            "validation": "dev_matched.tsv",
            "validation_mismatched": "dev_mismatched.tsv",
            "test": "test_matched.tsv",
            "test_mismatched": "test_mismatched.tsv",
        }
    return {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}


def _load_from_folder(task: GlueTask, folder: Path) -> DatasetDict:
    splits = DatasetDict()
    for split, file_name in _split_files(task).items():
        path = folder / file_name
        is_test = split.startswith("test")
        if path.is_file():
            splits[split] = _read_test_file(task, path) if is_test else _read_labelled_file(task, path)
        elif not is_test:
            raise FileNotFoundError(f"task {task.name} needs {path}, which does not exist")
    diagnostic = _diagnostic_file(folder) if task.name == "mnli" else None
    if diagnostic is not None:
        splits["test_diagnostic"] = _read_test_file(task, diagnostic)
    return splits


def _diagnostic_file(folder: Path) -> Path | None:
    """Returns the file of AX beside MNLI's folder; None if there is none."""
    candidates = (folder.resolve().parent / name for name in DIAGNOSTIC_FILES)
    return next((path for path in candidates if path.is_file()), None)


def _read_labelled_file(task: GlueTask, path: Path) -> Dataset:
    has_header = isinstance(task.file_label, str)
    columns, rows = read_tsv(path, [*task.file_columns, task.file_label], has_header)
    sentences = columns[:-1]
    labels = [_parse_label(task, text, path, row) for text, row in zip(columns[-1], rows, strict=True)]
    data = dict(zip(task.features, [*sentences, labels], strict=True))
    return Dataset.from_dict(data, features=task.features)


def _read_test_file(task: GlueTask, path: Path) -> Dataset:
    """Reads an unlabelled file: always with a header, whose first column numbers the rows.

    CoLA's test file has a header although its other files have none.
    """
    names = ("sentence",) if task.name == "cola" else task.file_columns
    columns, rows = read_tsv(path, [0, *names], has_header=True)
    index = [_parse_index(text, path, row) for text, row in zip(columns[0], rows, strict=True)]
    data = dict(zip(task.sentence_columns, columns[1:], strict=True))
    return Dataset.from_dict({**data, "index": index})


def _parse_label(task: GlueTask, text: str, path: Path, row: int) -> int | float:
    if task.labels is None:
        score = number_in(text)
        if score is None:
            raise ValueError(f"{path}, line {row}: the score must be a number, found {text!r}")
        return score
    known = task.labels if task.text_labels else tuple(str(label) for label in range(len(task.labels)))
    if text not in known:
        raise ValueError(f"{path}, line {row}: the label must be one of {', '.join(known)}, found {text!r}")
    return known.index(text)


def _parse_index(text: str, path: Path, row: int) -> int:
    if not text.isdecimal():
        raise ValueError(f"{path}, line {row}: the first column must number the rows, found {text!r}")
    return int(text)


def number_in(value: object) -> float | None:
    """Returns the finite number that `value` is or spells, otherwise None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
