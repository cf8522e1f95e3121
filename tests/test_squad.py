"""Question answering: the metric by hand, windows and spans on known texts, and the recipe from end to end."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    set_seed,
)

import rebnn_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import glue
import squad
from recipe_folder import STAGES, read_json
from recipe_training import CompactProgress
from squad_arguments import parse_squad_arguments
from squad_data import FEATURES, SQUAD, checked, load_files, load_hub, read_squad
from squad_windows import best_answers, best_span, check_tokenizer, find_span, training_windows, validation_windows

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "squad_tiny.json"
QUESTIONS = 12
MAX_LENGTH, STRIDE, MAX_ANSWER = 64, 16, 12
FILES = ["--train_file", str(TINY), "--validation_file", str(TINY)]
SMALL = ["--max_length", MAX_LENGTH, "--stride", STRIDE, "--max_answer_length", MAX_ANSWER]
SMALL += ["--teacher_learning_rate", 2e-3, "--teacher_epochs", 30, "--epochs", 20, "--batch_size", 8]
SMALL = [str(word) for word in [*SMALL, "--save_steps", 20, "--logging_steps", 10]]


def build_tokenizer() -> BertTokenizer:
    """WordPiece with the short words of the sample; longer ones fall apart into letters."""
    text = TINY.read_text(encoding="utf-8").lower()
    letters = sorted({letter for letter in text if not letter.isspace()})
    words = sorted({word for word in re.findall(r"\w+", text) if len(word) <= 7})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def rows() -> dict[str, list]:
    return Dataset.from_list(read_squad(TINY), features=FEATURES)[:]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer) -> Path:
    """A small BERT without a head, as one would download it."""
    folder = tmp_path_factory.mktemp("encoder")
    set_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- the metric


def score(prediction: str, *references: str) -> tuple[float, float]:
    metric = evaluate.load(str(ROOT / "recipes" / "metrics" / "squad"), keep_in_memory=True)
    scores = metric.compute(predictions=[prediction], references=[list(references)])
    return scores["exact_match"], scores["f1"]


@pytest.mark.parametrize(
    ("prediction", "references", "exact_match", "f1"),
    [
        ("The  Cat, sat!", ["a cat sat"], 100, 100),  # case, article, punctuation, spaces
        ("9 a.m.", ["9 AM"], 100, 100),  # punctuation goes before articles: no article in "a.m."
        ("theatre", ["atre"], 0, 0),  # articles are whole words
        ("well-known author", ["well known author"], 0, 100 * 2 / 5),  # punctuation leaves no gap: 2 and 3 words
        ("red red red", ["red red blue"], 0, 100 * 4 / 6),  # words count with their repetitions
        ("the old mill", ["in the old mill near Dunmore"], 0, 100 * 4 / (2 + 5)),
        ("the old mill", ["in the old mill near Dunmore", "a mill"], 0, 100 * 2 / 3),  # the best of the references
        ("\u201cZur Linde\u201d", ["Zur Linde"], 0, 0),  # only ASCII punctuation counts as such
        ("", ["mill"], 0, 0),
        ("the", ["a"], 100, 0),  # nothing is left of both: equal, but without a common word
    ],
)
def test_metric_by_hand(prediction, references, exact_match, f1):
    assert score(prediction, *references) == pytest.approx((exact_match, f1))


def test_metric_is_the_mean_over_questions():
    metric = evaluate.load(str(ROOT / "recipes" / "metrics" / "squad"), keep_in_memory=True)
    scores = metric.compute(predictions=["a b c", "x", "y"], references=[["b d"], ["x"], ["z"]])
    # Words b, c against b, d: 2 * 1 / 4.
    assert scores == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (0.5 + 1 + 0) / 3})
    with pytest.raises(ValueError, match=r"references\[0\] is empty"):
        metric.compute(predictions=["a"], references=[[]])


# ---------------------------------------------------------------------------------------------------------- the data


def test_nested_files_become_rows(rows):
    assert len(rows["id"]) == QUESTIONS and rows["id"][:2] == ["q00", "q01"]
    assert rows["answers"][0]["text"] == ["Ines Corbett", "the mason Ines Corbett"]
    for context, answers in zip(rows["context"], rows["answers"], strict=True):
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            assert context[start : start + len(text)] == text


def test_hub_rows_take_the_same_form(monkeypatch, rows):
    with_title = Dataset.from_list([{"title": "x", **row} for row in read_squad(TINY)])
    monkeypatch.setattr("squad_data.load_dataset", lambda name: {"train": with_title, "validation": with_title})
    assert load_hub()["validation"][:] == rows


def test_misplaced_training_answers_are_left_out_and_counted(rows):
    questions = read_squad(TINY)
    questions[3]["answers"]["answer_start"][0] += 1
    with pytest.warns(UserWarning, match=r"file: left out 1 of 12 questions.*'q03': expected 'the harbour council' at"):
        data = checked({"train": ("file", questions), "validation": ("file", questions)})
    assert (len(data["train"]), len(data["validation"])) == (11, 12)
    with pytest.raises(ValueError, match="left out 1 of 1"):
        checked({"train": ("file", questions[3:4])})


def broken(change) -> str:
    """The sample as JSON text after `change` has damaged its first paragraph."""
    content = json.loads(TINY.read_text(encoding="utf-8"))
    change(content["data"][0]["paragraphs"][0])
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{data", "is no JSON file"),
        ("[]", r"bad\.json: expected list 'data' as in train-v1\.1\.json, found None"),
        ('{"data": []}', "has no questions"),
        (broken(lambda p: p.pop("context")), r"data\[0\], paragraphs\[0\]: expected str 'context'.*found None"),
        (broken(lambda p: p["qas"][1].update(id=7)), r"paragraphs\[0\], qas\[1\]: expected str 'id'.*found 7"),
        (broken(lambda p: p["qas"][1].update(id="q00")), "the id 'q00' occurs twice"),
        (broken(lambda p: p["qas"][2].update(answers=[])), "question 'q02' has no answer.*not v2"),
        (broken(lambda p: p["qas"][2]["answers"][0].pop("answer_start")), r"answers\[0\]: expected int 'answer_start'"),
    ],
)
def test_files_of_another_form_are_explained(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_files(TINY, tmp_path / "bad.json")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        load_files(TINY, tmp_path / "none.json")


def test_without_a_connection_the_error_says_what_to_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(SystemExit) as refusal:
        squad.main(["--output_dir", str(tmp_path / "run")])
    message = str(refusal.value)
    assert "--train_file train-v1.1.json and --validation_file dev-v1.1.json" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- windows


def test_find_span_by_hand():
    #       [CLS] q  [SEP] "ab" "cd" " ef" (with its space) [SEP]
    starts, ends = [-1, -1, -1, 10, 12, 14, -1], [-1, -1, -1, 12, 14, 17, -1]
    assert find_span(starts, ends, 10, 12) == (3, 3)
    assert find_span(starts, ends, 12, 17) == (4, 5)
    assert find_span(starts, ends, 15, 17) == (5, 5), "a token may cover the space before it"
    assert find_span(starts, ends, 11, 13) == (3, 4), "an answer may begin and end inside tokens"
    assert find_span(starts, ends, 9, 12) is None and find_span(starts, ends, 15, 18) is None
    assert find_span([-1, 0, 0, 1], [-1, 1, 1, 2], 0, 1) == (1, 2), "two tokens of one character"
    assert find_span([-1], [-1], 0, 1) is None


@pytest.mark.parametrize(
    ("max_length", "stride", "lost"),
    [(128, 16, set()), (48, 12, set()), (40, 5, {10})],  # an answer longer than the stride may be whole nowhere
)
def test_positions_lead_back_to_the_answers(tokenizer, rows, max_length, stride, lost):
    how = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride}
    trained = training_windows(rows, **how)
    located = validation_windows(rows, list(range(QUESTIONS)), **how)
    assert trained["input_ids"] == located["input_ids"] and max(map(len, trained["input_ids"])) <= max_length
    answered = set()
    columns = (trained["start_positions"], trained["end_positions"], located["question"])
    for window, (first, last, question) in enumerate(zip(*columns, strict=True)):
        text, begin = (rows["answers"][question][name][0] for name in ("text", "answer_start"))
        starts, ends = located["char_start"][window], located["char_end"][window]
        covered = {place for span in zip(starts, ends, strict=True) for place in range(*span)}
        visible = {begin + i for i, letter in enumerate(text) if not letter.isspace()}
        if visible <= covered:
            answered.add(question)
            assert rows["context"][question][starts[first] : ends[last]] == text
        else:
            assert (first, last) == (0, 0) and trained["input_ids"][window][0] == tokenizer.cls_token_id
    assert answered == set(range(QUESTIONS)) - lost
    assert (len(located["question"]) > QUESTIONS) == (max_length < 128), "only short windows are several"


def test_neighbouring_windows_share_the_stride_and_miss_nothing(tokenizer, rows):
    windows = validation_windows(rows, list(range(100, 112)), tokenizer=tokenizer, max_length=40, stride=12)
    assert set(windows["question"]) == set(range(100, 112))
    for question in range(100, 112):
        mine = [i for i, number in enumerate(windows["question"]) if number == question]
        spans = [[start for start in windows["char_start"][i] if start >= 0] for i in mine]
        for one, two in itertools.pairwise(spans):
            assert one[-12:] == two[:12]
        whole = tokenizer(rows["context"][question - 100], add_special_tokens=False, return_offsets_mapping=True)
        assert sorted({start for span in spans for start in span}) == [a for a, _ in whole["offset_mapping"]]


def test_spaces_around_an_answer_are_no_part_of_it(tokenizer):
    rows = {"id": ["x"], "question": ["who?"], "context": ["it was ada  who ran"]}
    rows["answers"] = [{"text": [" ada  "], "answer_start": [6]}]
    windows = training_windows(rows, tokenizer=tokenizer, max_length=64, stride=4)
    (ids,), (first,), (last,) = (windows[name] for name in ("input_ids", "start_positions", "end_positions"))
    assert tokenizer.decode(ids[first : last + 1]) == "ada"


def test_questions_that_leave_no_room_are_named(tokenizer, rows):
    with pytest.raises(ValueError, match=r"question 'q00' has \d+ tokens and leaves \d+ of 30 .*--max_length"):
        training_windows(rows, tokenizer=tokenizer, max_length=30, stride=16)


def test_tokenizers_that_cannot_work_are_refused():
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer)
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the left"):
        check_tokenizer(tokenizer)
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match=r"no \[CLS\] token"):
        check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="pass a fast one"):
        check_tokenizer(SimpleNamespace(is_fast=False))


# ----------------------------------------------------------------------------------------------------------- answers


def test_best_span_by_hand():
    start, end = np.array([0.0, 5.0, 1.0, 0.0]), np.array([4.5, 0.0, 2.0, 3.0])
    # 1 -> 0 would have 9.5, but runs backwards.
    assert best_span(start, end, 4) == (8.0, 1, 3)
    assert best_span(start, end, 2) == (7.0, 1, 2)
    assert best_span(start, end, 1) == (5.0, 1, 1)
    assert best_span(np.zeros(3), np.zeros(3), 9) == (0.0, 0, 0), "of equal ones the first and shortest"


def test_best_span_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        start, end = rng.normal(size=(2, size))
        spans = [(start[a] + end[b], a, b) for a in range(size) for b in range(a, min(a + 5, size))]
        assert best_span(start, end, 5) == pytest.approx(max(spans))


def two_windows() -> tuple[Dataset, Dataset]:
    """One question in two windows: [CLS] q [SEP], three context tokens, [SEP]."""
    data = Dataset.from_dict({"context": ["red green blue gold", "none"]})
    windows = {"question": [0, 0], "char_start": [[-1, -1, -1, 0, 4, 10, -1], [-1, -1, -1, 4, 10, 15]]}
    windows["char_end"] = [[-1, -1, -1, 3, 9, 14, -1], [-1, -1, -1, 9, 14, 19]]
    return data, Dataset.from_dict(windows)


def test_answers_come_from_the_context_and_the_better_window():
    start, end = np.zeros((2, 7)), np.zeros((2, 7))
    start[:, :3], end[:, 6] = 99, 99  # question, special tokens and padding
    start[0, 4], end[0, 4] = 2.0, 1.0  # "green" in the first window: 3
    assert best_answers(*two_windows(), start, end, 3) == ["green", ""]
    start[1, 4], end[1, 5] = 2.0, 1.5  # "blue gold" in the second: 3.5
    assert best_answers(*two_windows(), start, end, 3) == ["blue gold", ""]
    assert best_answers(*two_windows(), start, end, 1) == ["green", ""], "too long by one token"
    with pytest.raises(ValueError, match="diverged"):
        best_answers(*two_windows(), start, end * np.nan, 3)


# ------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder) -> SimpleNamespace:
    """A complete run of the script on the sample."""
    folder = tmp_path_factory.mktemp("squad") / "run"
    options = [*FILES, "--model_name_or_path", str(encoder), *SMALL]
    command = [sys.executable, str(ROOT / "recipes" / "squad.py"), "--output_dir", str(folder), *options]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = read_json(folder / "results.json")
    return SimpleNamespace(folder=folder, options=options, output=process.stdout, results=results)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def rerun(folder: Path, finished: SimpleNamespace, *options: str) -> None:
    """Runs the recipe in this process, where nothing has to be imported again."""
    squad.main(["--output_dir", str(folder), *finished.options, *options])


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def answer(folder: Path, question: str, context: str, longest: int = MAX_ANSWER) -> str:
    """The answer of a saved model, span by span and without any code of the recipe."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
    windows = tokenizer(
        [question], [context], truncation="only_second", max_length=MAX_LENGTH, stride=STRIDE, padding=True,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt",
    )  # fmt: skip
    offsets = windows.pop("offset_mapping").tolist()
    del windows["overflow_to_sample_mapping"]
    with torch.no_grad():
        outputs = model(**windows)
    best = (-torch.inf, "")
    for window, pairs in enumerate(offsets):
        inside = [i for i, part in enumerate(windows.sequence_ids(window)) if part == 1]
        for first in inside:
            for last in (i for i in inside if first <= i < first + longest):
                value = float(outputs.start_logits[window, first] + outputs.end_logits[window, last])
                if value > best[0]:
                    best = (value, context[pairs[first][0] : pairs[last][1]])
    return best[1]


def test_predictions_are_those_of_the_packed_folder(finished, rows):
    predictions = read_json(finished.folder / "predictions.json")
    assert list(predictions) == rows["id"]
    questions = zip(rows["question"], rows["context"], strict=True)
    assert list(predictions.values()) == [answer(finished.folder / "packed", *question) for question in questions]


def test_scores_are_those_of_the_predictions(finished, rows):
    predictions = read_json(finished.folder / "predictions.json").values()
    pairs = zip(predictions, rows["answers"], strict=True)
    exact, f1 = np.mean([score(text, *answers["text"]) for text, answers in pairs], axis=0)
    scores = finished.results["scores"]
    assert scores["packed"] == pytest.approx({"exact_match": exact, "f1": f1})
    assert scores["packed"] == scores["latent"] and finished.results["max_logit_difference"] < 1e-4
    assert scores["teacher"]["f1"] > 70 and scores["packed"]["f1"] > 70, "a trained model knows its twelve answers"


def test_results_and_folder(finished):
    results = finished.results
    assert results["task"] == "squad" and results["examples"] == {"train": QUESTIONS, "validation": QUESTIONS}
    assert results["ratio"] == results["bytes"]["teacher"] / results["bytes"]["packed"] > 2.5
    assert results["arguments"]["stride"] == STRIDE and results["arguments"]["balance_rule"] == "flip_maxgrad"
    assert results["command"].startswith("python recipes/squad.py --output_dir")
    left = {path.name for path in finished.folder.iterdir()}
    assert left == {
        *STAGES,
        "stages",
        "settings.json",
        "results.json",
        "predictions.json",
        "oscillation.png",
        "epoch_flips.png",
        "weights.png",
    }
    packed = AutoModelForQuestionAnswering.from_pretrained(finished.folder / "packed")
    assert sum(isinstance(module, rebnn_hf.PackedLinear) for module in packed.modules()) == 12
    assert "| exact_match | f1" in finished.output


def test_model_card_and_its_code(finished, capsys):
    card = ModelCard.load(finished.folder / "packed" / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["f1"].metric_value == pytest.approx(finished.results["scores"]["packed"]["f1"], abs=1e-4)
    assert results["f1"].dataset_name == "squad_tiny" and card.data.pipeline_tag == "question-answering"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(compile(code.replace("path/to/this/folder", str(finished.folder / "packed")), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


# ----------------------------------------------------------------------------------------------------- running again


def test_same_command_repeats_nothing(finished, capsys):
    before = stamps(finished.folder)
    rerun(finished.folder, finished)
    after = stamps(finished.folder)
    assert {name for name in after if after[name] != before.get(name)} == {"settings.json"}
    output = capsys.readouterr().out
    assert output.count("already complete") == 3 and "| packed" in output


def test_interrupted_distillation_continues_to_the_same_weights(finished, copied, monkeypatch, capsys):
    for stage in ("latent", "packed"):
        shutil.rmtree(copied / stage)
        (copied / "stages" / f"{stage}.json").unlink()
    for name in ("results.json", "predictions.json"):
        (copied / name).unlink()
    teacher = stamps(copied / "teacher")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step >= 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", interrupt)
        rerun(copied, finished)
    rerun(copied, finished)
    assert re.search(r"continuing from step [23]0 of", capsys.readouterr().out)
    assert stamps(copied / "teacher") == teacher
    for stage in ("latent", "packed"):
        expected, found = (load_file(folder / stage / "model.safetensors") for folder in (finished.folder, copied))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), stage
    assert read_json(copied / "predictions.json") == read_json(finished.folder / "predictions.json")
    assert read_json(copied / "results.json")["scores"] == finished.results["scores"]


def test_changed_settings_are_refused_by_name(finished):
    before = stamps(finished.folder)
    with pytest.raises(SystemExit) as refusal:
        rerun(finished.folder, finished, "--stride", "8", "--max_eval_samples", "5")
    message = str(refusal.value)
    assert "stride: 16 -> 8" in message and "data: " in message and "--overwrite" in message
    assert stamps(finished.folder) == before


def test_overwrite_redoes_only_the_stages_concerned(finished, copied):
    before = stamps(copied)
    rerun(copied, finished, "--packed_dtype", "float16", "--overwrite")
    after = stamps(copied)
    assert all(after[name] == before[name] for name in before if name.startswith(("teacher/", "latent/")))
    results = read_json(copied / "results.json")
    assert results["bytes"]["packed"] < 0.6 * finished.results["bytes"]["packed"]
    assert 0 < results["max_logit_difference"] < 0.05


def test_the_longest_answer_may_change_without_training_again(finished, copied, rows):
    """It shapes only how models are scored, but that of all of them."""
    before = stamps(copied)
    rerun(copied, finished, "--max_answer_length", "1", "--overwrite")
    after = stamps(copied)
    assert all(after[name] == before[name] for name in before if name.startswith(("teacher/", "latent/")))
    scores = read_json(copied / "results.json")["scores"]
    questions = list(zip(rows["question"], rows["context"], rows["answers"], strict=True))
    for stage in STAGES:
        pairs = [(answer(copied / stage, question, context, 1), answers) for question, context, answers in questions]
        exact, f1 = np.mean([score(text, *answers["text"]) for text, answers in pairs], axis=0)
        assert scores[stage] == pytest.approx({"exact_match": exact, "f1": f1})
    assert scores["teacher"]["f1"] < finished.results["scores"]["teacher"]["f1"], "longer answers are cut"


def test_an_average_of_teachers_and_the_scores_of_its_fine_tunings(finished, tmp_path):
    options = ["--teacher_runs", "2", "--teacher_epochs", "2", "--max_steps", "1"]
    rerun(tmp_path, finished, *options)
    results = read_json(tmp_path / "results.json")
    assert [set(run) for run in results["teacher_run_scores"]] == [{"exact_match", "f1"}] * 2
    logs = [read_json(tmp_path / "teacher" / run / "trainer_state.json") for run in ("run-1", "run-2")]
    assert results["steps"]["teacher"] == sum(log["global_step"] for log in logs) > 0
    rerun(tmp_path, finished, *options, "--max_answer_length", "1", "--overwrite")
    results = read_json(tmp_path / "results.json")
    assert "teacher_run_scores" not in results, "those with longer answers do not compare"


def test_an_adapter_on_the_packed_model(finished, copied, rows):
    before = (copied / "packed" / "model.safetensors").read_bytes()
    rerun(copied, finished, "--lora", "2", "--lora_learning_rate", "1e-4")
    log = read_json(copied / "adapter" / "trainer_state.json")["log_history"]
    assert log[0]["loss"] < 0.01, "it starts where the student ended: with the token types"
    results = read_json(copied / "results.json")
    assert (copied / "packed" / "model.safetensors").read_bytes() == before
    assert results["adapter"]["rank"] == 2 and results["scores"]["adapter"]["f1"] > 70
    assert results["scores"]["packed"] == finished.results["scores"]["packed"]
    base = AutoModelForQuestionAnswering.from_pretrained(copied / "packed")
    model = PeftModel.from_pretrained(base, copied / "adapter")
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 12 and not any("qa_outputs" in name for name in adapted), "the head trains by itself"


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--train_file", "a.json"], "--train_file and --validation_file belong together"),
        (["--max_length", "0"], "--max_length 0 must be greater than 0"),
        (["--max_answer_length", "0"], "--max_answer_length 0 must be greater than 0"),
        (["--stride", "-1"], "--stride -1 must not be negative"),
        (["--epochs", "0"], "--epochs 0.0 must be greater than 0"),
        (["--task", "sst2"], "unrecognized"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_squad_arguments(options)
    assert complaint in capsys.readouterr().err


def test_options_left_out_take_the_defaults():
    arguments = parse_squad_arguments([])
    arguments.fill_in(SQUAD)
    assert (arguments.data.max_length, arguments.data.stride, arguments.data.max_answer_length) == (384, 128, 30)
    assert arguments.run.output_dir == "runs/squad" and arguments.student.batch_size == 32
    assert arguments.teacher.model_name_or_path == "google-bert/bert-base-uncased"


def test_missing_model_exits_with_one_sentence_and_leaves_nothing(tmp_path):
    options = ["--output_dir", str(tmp_path / "run"), *FILES, "--model_name_or_path", "no/such-model"]
    with pytest.raises(SystemExit, match="no/such-model cannot be loaded"):
        squad.main(options)
    assert not (tmp_path / "run").exists()


def test_teacher_for_another_task_is_refused(tmp_path, tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    options = ["--output_dir", str(tmp_path / "run"), *FILES, *SMALL, "--teacher", str(tmp_path / "teacher")]
    with pytest.raises(SystemExit, match=r"has no weights qa_outputs\.bias, qa_outputs\.weight, but squad needs"):
        squad.main(options)


def test_question_without_room_exits_with_one_sentence(tmp_path, encoder):
    options = ["--output_dir", str(tmp_path / "run"), *FILES, "--model_name_or_path", str(encoder)]
    with pytest.raises(SystemExit, match=r"question 'q00' has .* choose a greater --max_length or a smaller"):
        squad.main([*options, "--max_length", "64", "--stride", "60"])


def test_stages_are_those_of_the_other_recipe():
    """What glue.py learns to do, squad.py can do: they run the same functions."""
    assert squad.run_stages is glue.run_stages
    assert isinstance(glue.run_stages, types.FunctionType)
