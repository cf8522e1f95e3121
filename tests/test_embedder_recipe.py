"""recipes/embedder.py: its loss by hand, its data, and a whole run on a small embedder with random weights."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from embedders import SENTENCES, embedder
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import rebnn_hf
from rebnn_hf import ReBNNTrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import embedder as recipe
from embedder_arguments import DEFAULT_EMBEDDER, parse_embedder_arguments
from embedder_data import EmbedderTask, load_data
from embedder_training import EmbedderTrainer
from recipe_folder import STAGES, read_json
from recipe_training import CompactProgress

ROOT = Path(__file__).parents[1]
PAIRS = list(zip(SENTENCES[::2], SENTENCES[1::2], strict=True))
TRAIN, DEV = PAIRS[:24], PAIRS[:4] + list(zip(SENTENCES[::5], SENTENCES[3::5], strict=False))
SMALL = ["--epochs", "5", "--batch_size", "8", "--learning_rate", "2e-3", "--save_steps", "10", "--logging_steps", "5"]


def likeness(first: str, second: str) -> float:
    """Share of common words, from 0 to 5."""
    one, two = set(first.split()), set(second.split())
    return round(5 * len(one & two) / len(one | two), 3)


@pytest.fixture(scope="module")
def glue_folder(tmp_path_factory) -> Path:
    """STS-B as it is handed out."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "STS-B").mkdir()
    for name, pairs in (("train", TRAIN), ("dev", DEV)):
        rows = [f"{number}\t{a}\t{b}\t{likeness(a, b)}" for number, (a, b) in enumerate(pairs)]
        lines = ["index\tsentence1\tsentence2\tscore", *rows]
        (folder / "STS-B" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    embedder(folder / "transformer").save_pretrained(str(folder / "whole"))
    return folder / "whole"


# ---------------------------------------------------------------------------------------------------------- the loss


def relative(student: np.ndarray, teacher: np.ndarray) -> float:
    return float(np.square(student - teacher).sum() / np.square(teacher).sum())


def test_loss_by_hand(tmp_path):
    whole = embedder(tmp_path)
    float_model, student = whole[0].auto_model, embedder(tmp_path)[0].auto_model
    rebnn_hf.binarize(student)
    batch = {name: whole.preprocess(SENTENCES[:20:3])[name] for name in ("input_ids", "attention_mask")}
    arguments = ReBNNTrainingArguments(
        output_dir=str(tmp_path), logits_weight=0.0, label_weight=0.0, hidden_weight=0.5, report_to="none", use_cpu=True
    )
    trainer = EmbedderTrainer(
        model=student, teacher=float_model, args=arguments, pooling=torch.nn.Sequential(*list(whole)[1:]),
        embedding_weight=3.0,
    )  # fmt: skip
    student.train()
    torch.manual_seed(0)
    loss = trainer.compute_loss(student, batch).item()

    torch.manual_seed(0)  # the same dropout
    with torch.no_grad():
        mine = student(**batch, output_hidden_states=True).hidden_states
        theirs = float_model(**batch, output_hidden_states=True).hidden_states
    token = batch["attention_mask"].bool().numpy()
    assert not token.all(), "there is padding to be left out"
    hidden = sum(relative(s.numpy()[token], t.numpy()[token]) for s, t in zip(mine, theirs, strict=True))
    weight, bias = (tensor.detach().numpy() for tensor in (whole[2].linear.weight, whole[2].linear.bias))
    vectors = []
    for states in (mine[-1].numpy(), theirs[-1].numpy()):
        mean = (states * token[..., None]).sum(1) / token.sum(1, keepdims=True)
        dense = np.tanh(mean @ weight.T + bias)
        vectors.append(dense / np.linalg.norm(dense, axis=1, keepdims=True))
    assert loss == pytest.approx(0.5 * hidden + 3.0 * relative(*vectors), rel=1e-5)
    assert 0.5 * hidden > 0.1 and 3.0 * relative(*vectors) > 0.1, "both parts count"


# ---------------------------------------------------------------------------------------------------------- the data


def test_sentences_come_once_and_without_labels(glue_folder):
    data = load_data(["stsb"], str(glue_folder), None)
    assert data["train"][:] == {"sentence1": [a for a, _ in TRAIN] + [b for _, b in TRAIN]}
    assert list(data["validation"]["label"]) == pytest.approx([likeness(*pair) for pair in DEV])
    assert len(load_data(["stsb", "stsb"], str(glue_folder), None)["train"]) == 48


def test_a_text_file_takes_the_place_of_the_tasks(glue_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("one sentence\n\n  another one \none sentence\n")
    data = load_data(["stsb"], str(glue_folder), str(tmp_path / "mine.txt"))
    assert list(data["train"]["sentence1"]) == ["one sentence", "another one"]
    assert len(data["validation"]) == len(DEV)


@pytest.mark.parametrize(
    ("content", "message"), [("\n \n", "has no sentences: it should have one per line"), (b"\xff\xfe", "UTF-8")]
)
def test_files_without_text_are_named(glue_folder, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"--train_file .*bad\.txt.* {message}"):
        load_data(["stsb"], str(glue_folder), str(path))
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        load_data(["stsb"], str(glue_folder), str(tmp_path / "none.txt"))


# ------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, glue_folder, teacher) -> SimpleNamespace:
    """A complete run of the script."""
    folder = tmp_path_factory.mktemp("embedder") / "run"
    options = ["--data_dir", str(glue_folder), "--teacher", str(teacher), *SMALL]
    command = [sys.executable, str(ROOT / "recipes" / "embedder.py"), "--output_dir", str(folder), *options]
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
    recipe.main(["--output_dir", str(folder), *finished.options, *options])


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def embeddings(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    model = SentenceTransformer(str(folder), device="cpu")
    return tuple(model.encode(list(column)) for column in zip(*DEV, strict=True))


def test_scores_are_those_of_the_folders(finished, teacher):
    labels = [likeness(*pair) for pair in DEV]
    for stage in STAGES:
        first, second = embeddings(teacher if stage == "teacher" else finished.folder / stage)
        cosines = (first * second).sum(1)
        scores = {"spearman_cosine": spearmanr(labels, cosines)[0], "pearson_cosine": pearsonr(labels, cosines)[0]}
        assert finished.results["scores"][stage] == pytest.approx(scores, abs=1e-5), stage
    assert finished.results["max_logit_difference"] < 1e-5


def test_the_student_follows_its_teacher(finished, teacher):
    untrained = SentenceTransformer(str(teacher), device="cpu")
    rebnn_hf.binarize(untrained[0].auto_model)
    before = untrained.encode([a for a, _ in DEV])
    target, after = embeddings(teacher)[0], embeddings(finished.folder / "packed")[0]
    distance = {name: relative(mine, target) for name, mine in (("before", before), ("after", after))}
    assert distance["after"] < 0.5 * distance["before"]


def test_signs_of_three_values_are_scored_and_not_packed(finished, tmp_path, capsys):
    rerun(tmp_path, finished, "--preset", "bit-released", "--pooler", "false", "--epochs", "1")
    results = read_json(tmp_path / "results.json")
    assert set(results["scores"]) == {"teacher", "latent"} and results["not_packed"].startswith("ties='released'")
    assert results["scores"]["teacher"] == finished.results["scores"]["teacher"]
    first, second = embeddings(tmp_path / "latent")
    labels = [likeness(*pair) for pair in DEV]
    assert results["scores"]["latent"]["spearman_cosine"] == pytest.approx(
        spearmanr(labels, (first * second).sum(1))[0], abs=1e-5
    )
    assert not (tmp_path / "packed").exists() and "There is no packed model" in capsys.readouterr().out


def test_results_and_folder(finished):
    results = finished.results
    assert results["task"] == "embedder" and results["examples"] == {"train": 48, "validation": len(DEV)}
    assert results["steps"] == {"latent": 30} and results["arguments"]["balance_rule"] == "flip_maxgrad"
    assert results["ratio"] == results["bytes"]["teacher"] / results["bytes"]["packed"] > 2.5
    assert set(results["embeddings_per_second"]) == {"teacher", "packed"}
    assert all(rate > 0 for rate in results["embeddings_per_second"].values())
    assert results["command"].startswith("python recipes/embedder.py --output_dir")
    assert results["versions"]["sentence_transformers"]
    packed = SentenceTransformer(str(finished.folder / "packed"), device="cpu")
    assert [type(module).__name__ for module in packed] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert packed.prompts["query"] == "a dog is looking for a ", "what else the teacher has"
    assert sum(isinstance(module, rebnn_hf.PackedLinear) for module in packed.modules()) == 12
    assert "| spearman_cosine | pearson_cosine |" in finished.output


def test_model_card_and_its_code(finished, capsys):
    card = ModelCard.load(finished.folder / "packed" / "README.md")
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == pytest.approx(finished.results["scores"]["packed"], abs=1e-4)
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert card.data.base_model_relation == "quantized" and card.data.base_model
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(compile(code.replace("path/to/this/folder", str(finished.folder / "packed")), "README.md", "exec"), {})
    assert "tensor([[1.0" in capsys.readouterr().out


def test_same_command_repeats_nothing(finished, capsys):
    before = stamps(finished.folder)
    rerun(finished.folder, finished)
    after = stamps(finished.folder)
    assert {name for name in after if after[name] != before.get(name)} == {"settings.json"}
    assert capsys.readouterr().out.count("already complete") == 3


def test_interrupted_distillation_continues_to_the_same_weights(finished, copied, monkeypatch, capsys):
    for stage in ("latent", "packed"):
        shutil.rmtree(copied / stage)
        (copied / "stages" / f"{stage}.json").unlink()
    (copied / "results.json").unlink()

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step >= 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", interrupt)
        rerun(copied, finished)
    rerun(copied, finished)
    assert "continuing from step 10 of 30" in capsys.readouterr().out
    for stage in ("latent", "packed"):
        expected, found = (load_file(folder / stage / "model.safetensors") for folder in (finished.folder, copied))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), stage
    assert read_json(copied / "results.json")["scores"] == finished.results["scores"]


def test_stages_and_few_bits(finished, tmp_path):
    rerun(tmp_path, finished, "--stages", "rebnn-bit-w1a2", "--preset", "rebnn-bit-w1a1", "--max_steps", "4")
    results = read_json(tmp_path / "results.json")
    assert results["steps"] == {"stage-1": 4, "latent": 4}
    config = SentenceTransformer(str(tmp_path / "packed"), device="cpu")[0].auto_model.config.quantization_config
    assert (config.activation, config.activation_bits, config.attention) == ("elastic", 1, "elastic")


def test_changed_settings_are_refused_by_name(finished):
    before = stamps(finished.folder)
    with pytest.raises(SystemExit, match=r"embedding_weight: 1\.0 -> 2\.0"):
        rerun(finished.folder, finished, "--embedding_weight", "2")
    assert stamps(finished.folder) == before


def test_half_precision_for_what_stays_float(finished, copied):
    before = stamps(copied)
    rerun(copied, finished, "--packed_dtype", "float16", "--overwrite")
    after = stamps(copied)
    assert all(after[name] == before[name] for name in before if name.startswith("latent/"))
    results = read_json(copied / "results.json")
    assert results["bytes"]["packed"] < 0.65 * finished.results["bytes"]["packed"]
    assert 0 < results["max_logit_difference"] < 0.01


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--train_file", "a.txt", "--tasks", "sst2"], "--train_file brings its own sentences: leave out --tasks"),
        (["--tasks", "demo"], "invalid choice: 'demo'"),
        (["--max_length", "0"], "--max_length 0 must be greater than 0"),
        (["--hidden_weight", "0"], "--hidden_weight 0 leaves the token states without a teacher"),
        (["--embedding_weight", "-1"], "--embedding_weight -1.0 must not be negative"),
        (["--latent_learning_rate", "0"], "--latent_learning_rate 0.0 must be greater than 0"),
        (["--label_weight", "1"], "unrecognized"),
        (["--teacher_epochs", "1"], "unrecognized"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_embedder_arguments(options)
    assert complaint in capsys.readouterr().err


def test_options_left_out_take_the_defaults():
    arguments = parse_embedder_arguments([])
    arguments.fill_in(EmbedderTask())
    assert arguments.teacher.teacher == DEFAULT_EMBEDDER == "sentence-transformers/all-MiniLM-L6-v2"
    assert arguments.data.tasks == ["stsb"] and arguments.data.max_length == 128
    student = arguments.student
    assert (student.batch_size, student.learning_rate, student.activation_learning_rate) == (32, 1e-3, 1e-2)
    assert arguments.run.output_dir == "runs/embedder"


def test_teachers_that_cannot_be_used_are_refused(finished, tmp_path):
    words = StaticEmbedding(embedder(tmp_path / "t").tokenizer.backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words]).save_pretrained(str(tmp_path / "static"))
    for name, message in (
        ("no/such-model", "cannot be loaded"),
        (tmp_path / "static", "begins with a StaticEmbedding"),
    ):
        with pytest.raises(SystemExit, match=message):
            rerun(tmp_path / "run", finished, "--teacher", str(name))
    assert not (tmp_path / "run").exists()
