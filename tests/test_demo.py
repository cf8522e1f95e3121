"""The page of recipes/demo.py: the numbers behind it, its command line, and the page itself in a browser."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    pipeline,
    set_seed,
)

import rebnn_hf
from rebnn_hf import ReBNNConfig, kernels
from rebnn_hf.kernels import cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import demo
import glue
from demo_examples import EXAMPLES
from demo_models import load_contest, who_computes
from glue_grammar import build_demo_tokenizer, demo_dataset, demo_model_config
from glue_tasks import TASKS

ROOT = Path(__file__).parents[1]
SENTENCE = "the film was far from dull"
PAIR = ("the critics loved the film", "the critics hated the film")
SMALL = ["--max_train_samples", "320", "--max_eval_samples", "8", "--teacher_epochs", "1"]
SMALL += ["--max_steps", "2", "--learning_rate", "0.01"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += ["Chromium"] if CHROMIUM is None else []
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_engine = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.fixture(scope="module")
def keep_threads() -> Iterator[None]:
    """The demo task sets the number of threads of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return build_demo_tokenizer(list(demo_dataset()["train"]["sentence1"]))


def make_pair(folder: Path, tokenizer, method: ReBNNConfig | None = None, **fields) -> SimpleNamespace:
    """Folders of a float model with random weights, whose answers are far apart, and of the packed one."""
    set_seed(0)
    config = demo_model_config(len(tokenizer))
    for name, value in {"num_hidden_layers": 1, **fields}.items():
        setattr(config, name, value)
    teacher = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    packed = rebnn_hf.binarize(copy.deepcopy(teacher), method or ReBNNConfig())
    if packed.config.quantization_config.activation != "none":
        rebnn_hf.calibrate(packed, dict(tokenizer([SENTENCE, *PAIR], padding=True, return_tensors="pt")))
    paths = SimpleNamespace(float=folder / "float", packed=folder / "packed")
    for path, model in ((paths.float, teacher), (paths.packed, rebnn_hf.pack(packed))):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> SimpleNamespace:
    return make_pair(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, keep_threads) -> Path:
    """What `recipes/glue.py` leaves; its teacher and its student have hardly learned."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    glue.main(["--output_dir", str(folder), *SMALL])
    return folder


def softmax_of(folder: Path, *texts: str) -> dict[str, float]:
    """Probabilities by transformers' classes and the definition."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")).logits[0].double()
    shares = logits.exp() / logits.exp().sum()
    return {model.config.id2label[i]: share.item() for i, share in enumerate(shares)}


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("texts", [(SENTENCE,), PAIR])
def test_probabilities_are_those_of_the_saved_models(folders, texts):
    answer = load_contest(folders.float, folders.packed).answer(*texts)
    expected = {name: softmax_of(folder, *texts) for name, folder in vars(folders).items()}
    assert answer.teacher.scores == pytest.approx(expected["float"], abs=1e-6)
    assert answer.packed.scores == pytest.approx(expected["packed"], abs=1e-6)
    assert abs(expected["float"]["positive"] - expected["packed"]["positive"]) > 0.01  # else a swap would not be seen
    for scores in (answer.teacher.scores, answer.packed.scores):
        assert [*scores.values()] == sorted(scores.values(), reverse=True)


def test_probabilities_are_those_of_the_pipeline(folders):
    classify = pipeline("text-classification", model=str(folders.packed))
    expected = {found["label"]: found["score"] for found in classify(SENTENCE, top_k=None)}
    assert load_contest(folders.float, folders.packed).answer(SENTENCE).packed.scores == pytest.approx(expected)


def test_a_text_longer_than_the_model_reads_is_cut(folders):
    answer = load_contest(folders.float, folders.packed).answer(f"{SENTENCE} " * 20)
    first_38_words = " ".join((SENTENCE.split() * 20)[:38])  # and [CLS] and [SEP], of the model's 40 positions
    assert answer.packed.scores == pytest.approx(softmax_of(folders.packed, first_38_words), abs=1e-6)


def test_regression_predicts_a_number(tmp_path, tokenizer):
    paths = make_pair(tmp_path, tokenizer, num_labels=1, problem_type="regression")
    model = AutoModelForSequenceClassification.from_pretrained(paths.packed)
    with torch.no_grad():
        expected = model(**tokenizer(*PAIR, return_tensors="pt")).logits.item()
    answer = load_contest(paths.float, paths.packed).answer(*PAIR).packed
    assert [*answer.scores.values()] == [pytest.approx(expected, abs=1e-6)]


def test_the_time_is_that_of_the_model(folders):
    contest = load_contest(folders.float, folders.packed)
    contest.teacher.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    comparison = contest.answer(SENTENCE)
    assert comparison.teacher.milliseconds > 30
    assert comparison.faster == comparison.teacher.milliseconds / comparison.packed.milliseconds
    contest.packed.model.register_forward_pre_hook(lambda *_: time.sleep(0.15))
    assert contest.answer(SENTENCE).faster < 1


def test_sizes_are_those_of_the_files(folders):
    sizes = {name: (folder / "model.safetensors").stat().st_size for name, folder in vars(folders).items()}
    contest = load_contest(folders.float, folders.packed)
    assert {"float": contest.teacher.bytes, "packed": contest.packed.bytes} == sizes
    assert contest.smaller == sizes["float"] / sizes["packed"] > 2


@needs_engine
def test_the_page_says_who_computes(folders, tmp_path, tokenizer, monkeypatch):
    binary = make_pair(tmp_path, tokenizer, ReBNNConfig.preset("rebnn-bit-w1a1"))
    layered, fused = (load_contest(paths.float, paths.packed).packed.model for paths in (folders, binary))
    by_engine = f"by the C engine (backend cpu, with {cpu.isa_name()})"
    assert f"{by_engine}: 6 layers by the engine, each in a call of its own." in who_computes(layered)
    assert f"{by_engine}: 6 layers in one call of the engine." in who_computes(fused)
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    reference = load_contest(folders.float, folders.packed).packed.model
    assert "by the reference in torch (backend reference, because REBNN_BACKEND=reference): 6 layers 1-bit, but " in (
        who_computes(reference)
    )


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(folders, text):
    with pytest.raises(ValueError, match="nothing to classify: type a sentence"):
        load_contest(folders.float, folders.packed).answer(text)


# --------------------------------------------------------------------------------------------------- the command line


def test_models_of_a_run(run_folder):
    found = demo.find_models(demo.parse_arguments([str(run_folder)]))
    assert found == (run_folder / "teacher", run_folder / "packed", "demo")
    assert load_contest(*found[:2]).smaller == json.loads((run_folder / "results.json").read_text())["ratio"]


def test_models_of_a_run_with_a_teacher_from_elsewhere(folders, tmp_path, keep_threads):
    run = tmp_path / "run"
    glue.main(["--teacher", str(folders.float), "--output_dir", str(run), *SMALL])
    assert demo.find_models(demo.parse_arguments([str(run)])) == (str(folders.float), run / "packed", "demo")


def test_models_by_name():
    options = demo.parse_arguments(["--float", "a", "--packed", "b", "--task", "sst2"])
    assert demo.find_models(options) == ("a", "b", "sst2")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "`python recipes/glue.py --task demo` makes some in a minute, `python recipes/demo.py runs/demo` shows"),
        (["--float", "a"], "--float and --packed belong together"),
        (["runs/demo", "--task", "sst2"], "RUN_FOLDER brings its own models and task"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(arguments, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no results.json, so no finished run: pass the --output_dir"):
        demo.find_models(demo.parse_arguments([str(tmp_path)]))


def test_models_that_do_not_fit_are_refused(folders, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="is not a packed model"):
        load_contest(folders.float, folders.float)
    with pytest.raises(ValueError, match="is not a float model"):
        load_contest(folders.packed, folders.packed)
    with pytest.raises(SystemExit, match="no/model cannot be loaded: pass the folder of a model you have"):
        load_contest("no/model", folders.packed)
    other = make_pair(tmp_path, tokenizer, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ValueError, match=r"the labels \['bad', 'good'\] and the packed one \['negative', 'positive'\]"):
        load_contest(other.float, folders.packed)
    BertModel(demo_model_config(len(tokenizer))).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"encoder' is a BertModel; the page shows text classifiers"):
        load_contest(tmp_path / "encoder", folders.packed)


# ----------------------------------------------------------------------------------------------------------- the page


def test_every_task_has_examples_of_its_form(tokenizer):
    assert EXAMPLES.keys() == TASKS.keys()
    for name, examples in EXAMPLES.items():
        assert {len(texts) for texts in examples} == {len(TASKS[name].sentences)}
    words = {word for (text,) in EXAMPLES["demo"] for word in text.split()}
    assert words <= tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    "task, names",
    [
        ("sst2", ["Sentence"]),
        ("mrpc", ["First sentence", "Second sentence"]),
        ("mnli", ["Premise", "Hypothesis"]),
        ("qqp", ["First question", "Second question"]),
        ("custom", ["Sentence", "Second sentence, if the model reads pairs"]),
    ],
)
def test_the_boxes_are_those_of_the_task(folders, task, names):
    gradio = pytest.importorskip("gradio")
    from demo_page import build_page

    page = build_page(load_contest(folders.float, folders.packed), task)
    assert [block.label for block in page.blocks.values() if type(block) is gradio.Textbox] == names


def test_a_card_of_regression_shows_the_number(folders):
    pytest.importorskip("gradio")
    from demo_models import Answer
    from demo_page import card

    html = card("1-bit", load_contest(folders.float, folders.packed).packed, Answer({"LABEL_0": 3.14159}, 12.345))
    assert ">3.14</p>" in html and ">12.3 ms<" in html and "<table>" not in html


def test_labels_are_text_not_html(folders):
    pytest.importorskip("gradio")
    from demo_models import Answer
    from demo_page import card

    html = card("1-bit", load_contest(folders.float, folders.packed).packed, Answer({"<b>": 0.75, "&": 0.25}, 1.0))
    assert ">&lt;b&gt;</p>" in html and ">&amp;</th>" in html and ">75.0%<" in html and "<b>" not in html


AUDITED = """
import runpy, sys
log = open(sys.argv[1], "w", buffering=1)
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind") and isinstance(arguments[1], tuple):
        print(event, arguments[1][0], file=log)
    elif event == "socket.getaddrinfo":
        print(event, arguments[0], file=log)
sys.addaudithook(watch)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script and notes whom it asks for addresses, and which it connects to and serves at."""


@pytest.fixture(scope="module")
def served(run_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The script, as its users run it, and the network it uses: by default all would be allowed."""
    network = tmp_path_factory.mktemp("served") / "network.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
    paths = [str(ROOT), str(ROOT / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", AUDITED, str(network), str(ROOT / "recipes" / "demo.py"), str(run_folder)],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert found, "the script ended without a page"
    yield SimpleNamespace(url=found[0], network=network)
    process.terminate()
    process.wait(timeout=30)


def assert_nothing_of_the_net(served):
    network = served.network.read_text().splitlines()
    assert any(line == "socket.bind 127.0.0.1" for line in network)
    assert {line.split()[1] for line in network} <= {"127.0.0.1", "localhost", "::1"}, network


def get(url: str, body: dict | None = None) -> str:
    """What the server answers; `body` is posted."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=90) as response:
        return response.read().decode()


def press(url: str, name: str, *texts: str) -> dict:
    """What a browser does when its button is pressed: it joins Gradio's queue, and reads events up to the last one."""
    config = json.loads(get(f"{url}config"))
    (button,) = [part["id"] for part in config["components"] if part["props"].get("value") == name]
    (wired,) = [call["id"] for call in config["dependencies"] if [button, "click"] in call["targets"]]
    session = {"fn_index": wired, "trigger_id": button, "session_hash": f"{name}-{len(texts[0])}"}
    get(f"{url}gradio_api/queue/join", {"data": list(texts), **session})
    lines = get(f"{url}gradio_api/queue/data?session_hash={session['session_hash']}").splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    (last,) = [event for event in events if event["msg"] == "process_completed"]
    return last


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio")
def test_the_page_as_a_program_sees_it(served, run_folder):
    """What is served, and what its button answers; the test below sees it in a browser, where there is one."""
    assert json.loads(get(f"{served.url}config"))["title"] == "Float and 1-bit, side by side"
    assert get(served.url).startswith("<!doctype html>")
    completed = press(served.url, "Compare", SENTENCE)
    assert completed["success"]
    *cards, verdict = completed["output"]["data"]
    titles = {"Float teacher": run_folder / "teacher", "1-bit model": run_folder / "packed"}
    for html, (title, folder) in zip(cards, titles.items(), strict=True):
        assert f"<h2>{title}</h2>" in html
        expected = softmax_of(folder, SENTENCE)
        assert re.search(r'role="status">(\w+)</p>', html)[1] == max(expected, key=expected.get)
        rows = re.findall(r'<th scope="row">(\w+)</th>.*?<td>([\d.]+%)</td>', html)
        assert dict(rows) == {label: f"{share:.1%}" for label, share in expected.items()}
        size = (folder / "model.safetensors").stat().st_size / 1e6
        assert float(re.search(r"([\d.]+) MB", html)[1]) == pytest.approx(size, rel=0.005)
        assert float(re.search(r"([\d.]+) ms", html)[1]) > 0
    assert cards[0].partition("<table>")[2] != cards[1].partition("<table>")[2]
    assert re.search(r"The 1-bit model (is|takes) ", verdict)

    refused = press(served.url, "Compare", "")
    assert not refused["success"]
    assert refused["output"]["error"] == "There is nothing to classify: type a sentence first."
    assert_nothing_of_the_net(served)


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.mark.skipif(bool(MISSING), reason=f"no {', no '.join(MISSING)}")
def test_the_page_in_a_browser(served, run_folder, browser):
    page, asked = browser.new_page(), []
    page.set_default_timeout(90_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    cards = {name: page.get_by_role("region", name=name) for name in ("Float teacher", "1-bit model")}
    folders = dict(zip(cards, (run_folder / "teacher", run_folder / "packed"), strict=True))
    page.get_by_role("textbox", name="Sentence").fill(SENTENCE)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text(re.compile("The 1-bit model (is|takes)")).wait_for()

    for name, card in cards.items():
        shown, expected = card.inner_text(), softmax_of(folders[name], SENTENCE)
        assert card.get_by_role("status").inner_text() == max(expected, key=expected.get)
        rows = [row.inner_text().split() for row in card.get_by_role("row").all()]
        assert dict(rows) == {label: f"{share:.1%}" for label, share in expected.items()}
        size = (folders[name] / "model.safetensors").stat().st_size / 1e6
        assert float(re.search(r"([\d.]+) MB", shown)[1]) == pytest.approx(size, rel=0.005)
        assert float(re.search(r"([\d.]+) ms", shown)[1]) > 0
    texts = [card.get_by_role("row").first.inner_text() for card in cards.values()]
    assert texts[0] != texts[1]  # else columns could be swapped unnoticed
    assert "The 1-bit layers are computed by" in page.inner_text("body")

    page.get_by_role("textbox", name="Sentence").fill("")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("There is nothing to classify: type a sentence first.").wait_for()
    assert all(url.startswith((served.url, "data:", "blob:")) for url in asked), asked
    assert_nothing_of_the_net(served)
