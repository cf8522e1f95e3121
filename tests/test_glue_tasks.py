"""Loading of GLUE and custom data, and the submission files."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import EvalPrediction

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from glue_files import custom_task, describe, load_files
from glue_scores import compute_metrics, predictions_of, submission_name, write_submission
from glue_tasks import TASKS, get_task, load_task, unify_hub_columns

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "glue"


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    """Writes the lines with a line feed after each and tabs in the place of "|"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line.replace("|", "\t") + "\n" for line in lines).encode(encoding))
    return path


# ------------------------------------------------------------------------------------------------ table of tasks


def test_the_nine_tasks_and_the_demo():
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "demo"]
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["qnli"].labels == TASKS["rte"].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert TASKS["stsb"].labels is None
    assert (TASKS["stsb"].num_labels, TASKS["mnli"].num_labels, TASKS["sst2"].num_labels) == (1, 3, 2)
    assert TASKS["cola"].main_metric == "matthews_correlation"
    assert TASKS["stsb"].metrics == ("pearson", "spearmanr")
    assert TASKS["qqp"].metrics == TASKS["mrpc"].metrics == ("accuracy", "f1")
    assert TASKS["sst2"].sentence_columns == ("sentence1",)
    assert TASKS["qqp"].sentence_columns == ("sentence1", "sentence2")


def test_every_task_has_its_training_defaults():
    assert all(task.max_length >= 32 and task.batch_size == 32 for task in TASKS.values())
    assert TASKS["rte"].student_epochs > TASKS["sst2"].student_epochs >= TASKS["mnli"].student_epochs
    assert (TASKS["cola"].teacher_learning_rate, TASKS["cola"].student_learning_rate) == (5e-5, 1e-3)


def test_unknown_tasks_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown task 'sst-2': choose one of cola, sst2, .*demo"):
        load_task("sst-2")


def test_the_demo_needs_no_data():
    dataset = load_task("demo")
    assert {split: rows.num_rows for split, rows in dataset.items()} == {"train": 8000, "validation": 1000}


# ------------------------------------------------------------------------------------------------ original files


def test_cola_has_no_header_but_its_test_file_has(tmp_path):
    write(tmp_path / "CoLA" / "train.tsv", 'gj04|1||He said "no', "gj04|0|*|null", "bc|1||NA")
    write(tmp_path / "CoLA" / "dev.tsv", "gj04|0|*|Him ran.")
    write(tmp_path / "CoLA" / "test.tsv", "index|sentence", "0|Bill left.", "1|null")
    dataset = load_task("cola", tmp_path)
    assert dataset["train"].to_dict() == {"sentence1": ['He said "no', "null", "NA"], "label": [1, 0, 1]}
    assert dataset["train"].features["label"].names == ["unacceptable", "acceptable"]
    assert dataset["validation"].to_dict() == {"sentence1": ["Him ran."], "label": [0]}
    assert dataset["test"].to_dict() == {"sentence1": ["Bill left.", "null"], "index": [0, 1]}


def test_mrpc_has_a_byte_order_mark_and_loose_quotes(tmp_path):
    header = "Quality|#1 ID|#2 ID|#1 String|#2 String"
    rows = ['1|11|12|" One opens .|None closes .', '0|21|22|Two " here .|" Three']
    write(tmp_path / "train.tsv", header, *rows, encoding="utf-8-sig")
    write(tmp_path / "dev.tsv", header, "1|31|32|a|b")
    write(tmp_path / "test.tsv", "index|#1 ID|#2 ID|#1 String|#2 String", '0|1|2|x "|y', encoding="utf-8-sig")
    dataset = load_task("mrpc", tmp_path)
    assert dataset["train"].to_dict() == {
        "sentence1": ['" One opens .', 'Two " here .'],
        "sentence2": ["None closes .", '" Three'],
        "label": [1, 0],
    }
    assert dataset["validation"].num_rows == 1
    assert dataset["test"].to_dict() == {"sentence1": ['x "'], "sentence2": ["y"], "index": [0]}


def test_short_qqp_rows_are_left_out_and_counted(tmp_path):
    header = "id|qid1|qid2|question1|question2|is_duplicate"
    rows = ["7|1|2|How?|Why?|0", "8|3|4|A question that", "breaks here?|Whole?|1", '9|5|6|"Who"?|Who?|1']
    write(tmp_path / "QQP" / "train.tsv", header, *rows)
    write(tmp_path / "QQP" / "dev.tsv", header, rows[0])
    with pytest.warns(UserWarning, match=r"train\.tsv: left out 2 of 4 rows.*6 fields \(the first is line 3\)"):
        dataset = load_task("qqp", tmp_path)
    assert dataset["train"].to_dict() == {
        "sentence1": ["How?", '"Who"?'],
        "sentence2": ["Why?", "Who?"],
        "label": [0, 1],
    }


def test_complete_files_warn_of_nothing(tmp_path):
    write(tmp_path / "SST-2" / "train.tsv", "sentence|label", "fine |1", "null|0")
    write(tmp_path / "SST-2" / "dev.tsv", "sentence|label", "NA|0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_task("sst2", tmp_path)
    assert dataset["train"]["sentence1"][:] == ["fine ", "null"]


def test_mnli_has_two_of_every_held_out_split(tmp_path):
    header = "index|promptID|sentence1|sentence2|label1|gold_label"
    write(tmp_path / "train.tsv", header, "0|9|a|b|neutral|contradiction", "1|9|c|d|neutral|entailment")
    write(tmp_path / "dev_matched.tsv", header, "0|9|e|f|entailment|neutral")
    write(tmp_path / "dev_mismatched.tsv", header, "0|9|g|h|entailment|contradiction")
    write(tmp_path / "test_matched.tsv", "index|promptID|sentence1|sentence2", "0|9|i|j")
    write(tmp_path / "test_mismatched.tsv", "index|promptID|sentence1|sentence2", "0|9|k|l")
    dataset = load_task("mnli", tmp_path)
    assert list(dataset) == ["train", "validation", "validation_mismatched", "test", "test_mismatched"]
    assert dataset["train"]["label"][:] == [2, 0]
    assert dataset["validation"].to_dict() == {"sentence1": ["e"], "sentence2": ["f"], "label": [1]}
    assert dataset["validation_mismatched"]["label"][:] == [2]
    assert dataset["test_mismatched"].to_dict() == {"sentence1": ["k"], "sentence2": ["l"], "index": [0]}


def mnli_files(folder: Path) -> None:
    for file in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        write(folder / file, "index|sentence1|sentence2|gold_label", "0|a|b|neutral")


@pytest.mark.parametrize("file", ["AX/AX.tsv", "diagnostic/diagnostic.tsv"])
@pytest.mark.parametrize("data_dir", [".", "MNLI"])
def test_mnli_brings_the_diagnostic_set_if_it_is_there(tmp_path, file, data_dir):
    mnli_files(tmp_path / "MNLI")
    assert "test_diagnostic" not in load_task("mnli", tmp_path / data_dir)
    write(tmp_path / file, "index|sentence1|sentence2", '0|The "cat" sat.|It sat.', "1|null|NA")
    diagnostic = load_task("mnli", tmp_path / data_dir)["test_diagnostic"]
    assert diagnostic.to_dict() == {
        "sentence1": ['The "cat" sat.', "null"],
        "sentence2": ["It sat.", "NA"],
        "index": [0, 1],
    }


def test_other_tasks_leave_the_diagnostic_set_alone(tmp_path):
    write(tmp_path / "AX" / "AX.tsv", "index|sentence1|sentence2", "0|a|b")
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "RTE" / file, "index|sentence1|sentence2|label", "0|a|b|entailment")
    assert list(load_task("rte", tmp_path)) == ["train", "validation"]


def test_diagnostic_file_of_another_form_is_refused(tmp_path):
    mnli_files(tmp_path / "MNLI")
    write(tmp_path / "AX" / "AX.tsv", "index|premise|hypothesis", "0|a|b")
    with pytest.raises(ValueError, match=r"AX\.tsv has the columns .*'premise'.* but not \['sentence1', 'sentence2'\]"):
        load_task("mnli", tmp_path)


@pytest.mark.parametrize(
    ("task", "header"), [("rte", "index|sentence1|sentence2|label"), ("qnli", "index|question|sentence|label")]
)
def test_textual_labels_take_glues_ids(tmp_path, task, header):
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / file, header, "0|a|b|not_entailment", "1|c|d|entailment")
    assert load_task(task, tmp_path)["train"].to_dict() == {
        "sentence1": ["a", "c"],
        "sentence2": ["b", "d"],
        "label": [1, 0],
    }


def test_wnli_and_stsb(tmp_path):
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "WNLI" / file, "index|sentence1|sentence2|label", "0|a|b|1")
        write(tmp_path / "STS-B" / file, "index|genre|sentence1|sentence2|score", "0|x|a|b|3.75", "1|x|c|d|5")
    assert load_task("wnli", tmp_path)["train"]["label"][:] == [1]
    assert load_task("stsb", tmp_path)["validation"]["label"][:] == [3.75, 5.0]


def test_windows_line_ends_do_not_reach_the_labels(tmp_path):
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / file, "sentence|label\r", "good|1\r")
    assert load_task("sst2", tmp_path)["train"].to_dict() == {"sentence1": ["good"], "label": [1]}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        load_task("rte", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"task rte needs .*RTE.train\.tsv or .*neither exists"):
        load_task("rte", tmp_path)
    write(tmp_path / "RTE" / "train.tsv", "index|sentence1|sentence2|label", "0|a|b|entailment")
    with pytest.raises(FileNotFoundError, match=r"task rte needs .*RTE.dev\.tsv, which does not exist"):
        load_task("rte", tmp_path)


def test_the_file_of_another_task_is_recognised(tmp_path):
    write(tmp_path / "train.tsv", "sentence|label", "good|1")
    with pytest.raises(ValueError, match=r"has the columns \['sentence', 'label'\] but not \['sentence1'"):
        load_task("rte", tmp_path)
    with pytest.raises(ValueError, match="no row of 4 tab-separated fields"):
        load_task("cola", tmp_path)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("rte", "0|a|b|maybe", "line 2: the label must be one of entailment, not_entailment, found 'maybe'"),
        ("wnli", "0|a|b|2", "line 2: the label must be one of 0, 1, found '2'"),
        ("stsb", "0|a|b|nan", "line 2: the score must be a number, found 'nan'"),
    ],
)
def test_bad_labels_are_reported_with_their_line(tmp_path, task, row, message):
    label = "score" if task == "stsb" else "label"
    write(tmp_path / "train.tsv", f"index|sentence1|sentence2|{label}", row)
    with pytest.raises(ValueError, match=message):
        load_task(task, tmp_path)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"{REAL_DATA} with the original GLUE files is not here")
@pytest.mark.parametrize(
    ("task", "train_rows", "validation_rows", "label", "ending"),
    [
        ("sst2", 67349, 872, 1, "often affecting journey . "),
        ("cola", 8551, 1043, 1, "clear of the rocks."),
        ("rte", 2490, 277, 1, "Christopher Reeve Foundation."),
        ("stsb", 5749, 1500, 5.0, "a hard hat is dancing."),
        ("mrpc", 3667, 408, 1, "growth strategy ."),
    ],
)
def test_the_original_files(task, train_rows, validation_rows, label, ending):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_task(task, REAL_DATA)
    assert (dataset["train"].num_rows, dataset["validation"].num_rows) == (train_rows, validation_rows)
    assert dataset["validation"][0]["label"] == label
    assert dataset["validation"][0]["sentence1"].endswith(ending)
    assert None not in dataset["train"]["sentence1"][:]


# -------------------------------------------------------------------------------------------------------- Hub


def test_hub_columns_and_splits_are_unified():
    names = ClassLabel(names=list(TASKS["mnli"].labels))
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [4]}
    rows = Dataset.from_dict(columns).cast_column("label", names)
    hidden = Dataset.from_dict({**columns, "label": [-1]})
    hub = {"train": rows, "validation_matched": rows, "validation_mismatched": rows, "test_matched": hidden}
    dataset = unify_hub_columns(TASKS["mnli"], DatasetDict(hub))
    assert list(dataset) == ["train", "validation", "validation_mismatched", "test"]
    assert dataset["validation"].to_dict() == {"sentence1": ["a"], "sentence2": ["b"], "label": [2]}
    assert dataset["test"].to_dict() == {"sentence1": ["a"], "sentence2": ["b"], "index": [4]}


def test_mnli_from_the_hub_brings_the_diagnostic_set(monkeypatch):
    rows = Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [1], "idx": [0]})
    hidden = Dataset.from_dict({"premise": ["c", "e"], "hypothesis": ["d", "f"], "label": [-1, -1], "idx": [0, 1]})

    def load_dataset(name: str, config: str, split: str | None = None) -> DatasetDict | Dataset:
        assert name == "nyu-mll/glue" and (config, split) in {("mnli", None), ("ax", "test")}
        return hidden if config == "ax" else DatasetDict({"train": rows, "validation_matched": rows})

    monkeypatch.setattr("glue_tasks.load_dataset", load_dataset)
    dataset = load_task("mnli")
    assert list(dataset) == ["train", "validation", "test_diagnostic"]
    expected = {"sentence1": ["c", "e"], "sentence2": ["d", "f"], "index": [0, 1]}
    assert dataset["test_diagnostic"].to_dict() == expected


def test_hub_columns_that_already_have_their_names():
    rows = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [0], "idx": [0]})
    dataset = unify_hub_columns(TASKS["rte"], DatasetDict(train=rows))
    assert dataset["train"].column_names == ["sentence1", "sentence2", "label"]


def test_without_a_connection_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"task rte without a connection.*pass --data_dir FOLDER.*--task demo"):
        load_task("rte")


# ------------------------------------------------------------------------------------------------ files of one's own


def test_csv_with_named_classes(tmp_path):
    train = write(tmp_path / "train.csv", "id,text,label", '1,"good, really",pos', "2,null,neg", "3,ok,mid")
    validation = write(tmp_path / "dev.csv", "text,label", "NA,pos")
    test = write(tmp_path / "test.csv", "text", "unseen", "other")
    dataset = load_files(train, validation, test)
    assert dataset["train"].to_dict() == {"sentence1": ["good, really", "null", "ok"], "label": [2, 1, 0]}
    assert dataset["train"].features["label"].names == ["mid", "neg", "pos"]
    assert dataset["validation"].to_dict() == {"sentence1": ["NA"], "label": [2]}
    assert dataset["test"].to_dict() == {"sentence1": ["unseen", "other"], "index": [0, 1]}
    task = custom_task(dataset)
    assert (task.name, task.labels, task.metrics) == ("custom", ("mid", "neg", "pos"), ("accuracy",))
    assert (task.metric_configuration, task.sentence_columns) == ("classification", ("sentence1",))
    assert describe(task) == "custom: single sentences, 3 classes (mid, neg, pos)"


def test_whole_numbers_are_classes_in_numeric_order(tmp_path):
    train = write(tmp_path / "train.tsv", "sentence|label", 'a "|10', "b|2", "c|-1")
    validation = write(tmp_path / "dev.jsonl", json.dumps({"sentence": "d", "label": 10}))
    dataset = load_files(train, validation)
    assert dataset["train"].to_dict() == {"sentence1": ['a "', "b", "c"], "label": [2, 1, 0]}
    assert dataset["validation"]["label"][:] == [2]
    assert dataset["train"].features["label"].names == ["-1", "2", "10"]


def test_floats_mean_regression(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 2.5}]
    train = tmp_path / "train.json"
    train.write_text(json.dumps(rows))
    validation = write(tmp_path / "dev.csv", "sentence1,sentence2,label", "e,f,3")
    dataset = load_files(train, validation)
    assert dataset["train"]["label"][:] == [1.0, 2.5]
    assert dataset["validation"].to_dict() == {"sentence1": ["e"], "sentence2": ["f"], "label": [3.0]}
    assert dataset["train"].features["label"] == Value("float32")
    task = custom_task(dataset)
    assert (task.num_labels, task.main_metric, task.metric_configuration) == (1, "pearson", "regression")
    assert task.sentence_columns == ("sentence1", "sentence2")
    assert describe(task) == "custom: pairs of sentences, a number for each (regression)"


def test_of_many_classes_some_are_named(tmp_path):
    train = write(tmp_path / "train.csv", "text,label", *(f"a,{label}" for label in range(12)))
    line = describe(custom_task(load_files(train, train)))
    assert line == "custom: single sentences, 12 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"


def test_a_labelled_test_file_keeps_its_labels(tmp_path):
    train = write(tmp_path / "train.csv", "text,label", "a,x", "b,y")
    dataset = load_files(train, train, train)
    assert dataset["test"].to_dict() == {"sentence1": ["a", "b"], "label": [0, 1], "index": [0, 1]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["quote,label", "a,x"], "no column sentence1, sentence or text; found quote, label"),
        (["text,kind", "a,x"], r"other\.csv lacks the column label"),
        (["text,label"], "has no rows"),
        (["text,label", "a,z", "b,w"], r"other\.csv has labels that .*train\.csv has not: w, z"),
        (["text,label", "a,x", "b"], "row 2: expected a value in column 'label', found None"),
        (["text,sentence2,label", "a,b,x"], r"has the column sentence2; .*train\.csv has not"),
    ],
)
def test_bad_validation_files_are_explained(tmp_path, lines, message):
    train = write(tmp_path / "train.csv", "text,label", "a,x", "b,y")
    with pytest.raises(ValueError, match=message):
        load_files(train, write(tmp_path / "other.csv", *lines))


def test_other_bad_files_are_explained(tmp_path):
    train = write(tmp_path / "train.csv", "text,label", "a,x", "b,y")
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        load_files(train, tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"extension '\.txt': expected one of \.csv, \.tsv, \.json, \.jsonl"):
        load_files(write(tmp_path / "train.txt", "text"), train)
    with pytest.raises(ValueError, match="one label only, 'x'"):
        load_files(write(tmp_path / "one.csv", "text,label", "a,x"), train)
    with pytest.raises(ValueError, match="neither a JSON list of objects nor one JSON object a line"):
        load_files(write(tmp_path / "bad.jsonl", "{text: 1}"), train)
    with pytest.raises(ValueError, match="row 1: expected a text in column 'text', found 3"):
        load_files(write(tmp_path / "number.jsonl", '{"text": 3, "label": 1}'), train)
    scores = write(tmp_path / "scores.csv", "text,label", "a,0.5", "b,1.5")
    with pytest.raises(ValueError, match="row 1: expected a number as label, found 'x'"):
        load_files(scores, train)


# ------------------------------------------------------------------------------------------ metrics, submissions


def test_compute_metrics_of_a_classifier():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [-1.0, 3.0], [5.0, 4.0]])
    prediction = EvalPrediction(predictions=(logits, np.zeros(4)), label_ids=np.array([0, 1, 0, 1]))
    # 1 true positive, 1 false positive, 1 false negative.
    assert compute_metrics(TASKS["mrpc"])(prediction) == {"accuracy": 0.5, "f1": 0.5}


def test_compute_metrics_of_a_regression():
    prediction = EvalPrediction(
        predictions=np.array([[1.0], [2.0], [3.0]], dtype=np.float32), label_ids=np.array([3.0, 2.0, 1.0])
    )
    metrics = compute_metrics(TASKS["stsb"])
    assert metrics(prediction) == pytest.approx({"pearson": -1.0, "spearmanr": -1.0})
    assert metrics(prediction) == pytest.approx({"pearson": -1.0, "spearmanr": -1.0})  # reusable


def test_diverged_logits_are_an_error():
    with pytest.raises(ValueError, match="diverged"):
        predictions_of(TASKS["sst2"], np.array([[0.0, np.nan]]))


@pytest.mark.parametrize(
    ("task", "predictions", "column"),
    [
        ("cola", np.array([0, 1]), ["0", "1"]),
        ("mnli", [2, 1], ["contradiction", "neutral"]),
        ("rte", [1, 0], ["not_entailment", "entailment"]),
        ("qnli", [0, 1], ["entailment", "not_entailment"]),
        ("wnli", [1, 0], ["1", "0"]),
        ("stsb", np.array([-0.2, 5.31], dtype=np.float32), ["0.000", "5.000"]),
        ("stsb", [2.71828, 3], ["2.718", "3.000"]),
    ],
)
def test_submissions(tmp_path, task, predictions, column):
    path = tmp_path / submission_name(TASKS[task])
    write_submission(path, TASKS[task], [3, 8], predictions)
    expected = f"index\tprediction\n3\t{column[0]}\n8\t{column[1]}\n"
    assert path.read_bytes() == expected.encode()


def test_submission_names():
    assert submission_name(TASKS["sst2"]) == "SST-2.tsv"
    assert submission_name(TASKS["mnli"]) == "MNLI-m.tsv"
    assert submission_name(TASKS["mnli"], "test_mismatched") == "MNLI-mm.tsv"
    assert submission_name(TASKS["mnli"], "test_diagnostic") == "AX.tsv"


def test_bad_predictions_are_refused(tmp_path):
    path = tmp_path / "x.tsv"
    with pytest.raises(ValueError, match="got 1 predictions for 2 indices"):
        write_submission(path, TASKS["rte"], [0, 1], [1])
    with pytest.raises(ValueError, match="one of 0 to 1, got 2"):
        write_submission(path, TASKS["rte"], [0], [2])
    with pytest.raises(ValueError, match="finite number"):
        write_submission(path, TASKS["stsb"], [0], [float("nan")])
    assert not path.exists()


def test_get_task_returns_the_entry():
    assert get_task("rte") is TASKS["rte"]
