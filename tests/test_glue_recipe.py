"""The recipe from end to end: the real script on a reduced demo, its continuation after a kill, and its parts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    MPNetConfig,
    MPNetModel,
    TrainingArguments,
    set_seed,
)
from transformers.models.bert.modeling_bert import BertIntermediate

import rebnn_hf
from rebnn_hf import kernels
from rebnn_hf.checkpoints import STATE_FILE, newest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import ablation_teacher
import glue
import recipe_stages
from glue_arguments import parse_glue_arguments
from glue_grammar import demo_dataset, demo_model_config
from glue_job import GlueJob
from glue_tasks import get_task
from hub_server import Hub, Repo, serving
from recipe_folder import STAGES, RunFolder, read_json
from recipe_job import hint_at_idle_cores
from recipe_packing import check_equal, largest_difference
from recipe_stages import check_architecture
from recipe_teacher import check_labels, mean_weights
from recipe_training import (
    CompactProgress,
    FineTuningTrainer,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "glue.py"
EXAMPLES, EVALUATED, STEPS = 320, 200, 60
SMALL = ["--max_train_samples", EXAMPLES, "--max_eval_samples", EVALUATED, "--teacher_epochs", 1]
SMALL = [str(word) for word in [*SMALL, "--max_steps", STEPS, "--save_steps", 15, "--logging_steps", 10]]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(autouse=True)
def _keep_threads():
    """The demo sets the number of threads of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def start(folder: Path, *options: str, launcher: tuple[str, ...] = (sys.executable,), **environment: str):
    """Starts the script in a process of its own."""
    command = [*launcher, str(SCRIPT), "--output_dir", str(folder), *options]
    return subprocess.Popen(
        command, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_script(folder: Path, *options: str, **how) -> tuple[str, str]:
    """Runs the script to its successful end."""
    process = start(folder, *options, **how)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def rerun(folder: Path, *options: str) -> None:
    """Runs the recipe in this process, where nothing has to be imported again."""
    glue.main(["--output_dir", str(folder), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    """A complete run of the reduced demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    output, errors = run_script(folder, *SMALL)
    return SimpleNamespace(folder=folder, output=output, errors=errors, results=read_json(folder / "results.json"))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the complete run to be changed."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def accuracy(folder: Path) -> float:
    """Accuracy of a saved model on the demo's validation examples, without any code of the recipe."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = demo_dataset()["validation"][:EVALUATED]
    with torch.no_grad():
        logits = model(**tokenizer(rows["sentence1"], padding=True, return_tensors="pt")).logits
    return (logits.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    return load_file(folder / "model.safetensors")


def stamps(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- a whole run


def test_scores_are_those_of_the_saved_folders(finished):
    for stage in STAGES:
        assert finished.results["scores"][stage]["accuracy"] == pytest.approx(accuracy(finished.folder / stage))
    assert finished.results["scores"]["packed"] == finished.results["scores"]["latent"]
    assert finished.results["max_logit_difference"] < 1e-4


def test_sizes_are_those_of_the_files(finished):
    sizes = {stage: (finished.folder / stage / "model.safetensors").stat().st_size for stage in STAGES}
    assert finished.results["bytes"] == sizes
    assert finished.results["ratio"] == sizes["teacher"] / sizes["packed"] > 4
    assert (
        rebnn_hf.summary(AutoModelForSequenceClassification.from_pretrained(finished.folder / "packed")).totals
        == (finished.results["size"])
    )


def test_results_say_how_they_were_made(finished):
    results = finished.results
    assert results["examples"] == {"train": EXAMPLES, "validation": EVALUATED}
    assert results["steps"] == {"teacher": EXAMPLES // 32, "latent": STEPS}
    assert results["arguments"]["max_steps"] == STEPS and results["arguments"]["balance_rule"] == "flip_maxgrad"
    assert results["arguments"]["hidden_loss"] == "relative_mse"
    assert results["versions"]["torch"] == torch.__version__
    assert results["hardware"]["threads"] == 1 and results["hardware"]["cpu"]
    assert 0.5 < results["scores"]["bag_of_words"]["accuracy"] < 0.9
    assert all(seconds > 0 for seconds in results["seconds"].values())
    assert results["command"].startswith("python recipes/glue.py --output_dir")


def test_console_is_short_and_ends_with_the_table(finished):
    lines = [line for line in finished.output.splitlines() if line.strip()]
    reports = [line for line in lines if line.startswith("step ")]
    others = [line for line in lines if line not in reports]
    assert others[:3] == ["teacher: started", "latent: started", "packed: started"]
    assert any(line.startswith("| packed") for line in others) and len(others) < 15
    assert any("flips" in line for line in reports)
    assert max(map(len, reports)) < 140, "values of single layers belong into the log history"
    log = read_json(finished.folder / "latent" / STATE_FILE)["log_history"]
    assert any(key.startswith("flip_ratio/") for key in log[-1])


def test_folder_holds_what_it_should_and_nothing_else(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        *STAGES,
        "stages",
        "settings.json",
        "results.json",
        "oscillation.png",
        "epoch_flips.png",
        "weights.png",
    }
    assert not list(finished.folder.rglob("checkpoint-*")), "checkpoints of finished stages"
    assert not list(finished.folder.rglob("*.draft"))
    assert (finished.folder / "oscillation.png").read_bytes().startswith(b"\x89PNG")


def test_model_card(finished):
    card = ModelCard.load(finished.folder / "packed" / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(finished.results["scores"]["packed"]["accuracy"], abs=1e-4)
    assert card.data.library_name == "transformers" and "1-bit" in card.data.tags
    assert "import rebnn_hf" in card.text and finished.results["command"] in card.text
    assert "PackedLinear" in card.text


def test_cards_say_where_the_model_comes_from_and_the_licence(copied):
    """Also where the licence is thought of when everything is done."""
    assert "license" not in ModelCard.load(copied / "packed" / "README.md").data.to_dict()
    before = {name: stamp for name, stamp in stamps(copied).items() if name.endswith(".safetensors")}
    rerun(copied, *SMALL, "--license", "apache-2.0")
    card = ModelCard.load(copied / "packed" / "README.md")
    assert card.data.license == "apache-2.0" and "--license apache-2.0" in card.text
    assert "base_model" not in card.data.to_dict(), "the demo is trained from nothing"
    assert {name: stamp for name, stamp in stamps(copied).items() if name in before} == before


# ----------------------------------------------------------------------------------------------------- running again


def test_same_command_repeats_nothing(finished, capsys):
    before = stamps(finished.folder)
    rerun(finished.folder, *SMALL)
    after = stamps(finished.folder)
    assert {name for name in after if after[name] != before.get(name)} == {"settings.json"}
    output = capsys.readouterr().out
    assert output.count("already complete") == 3 and "| packed" in output


def test_changed_settings_are_refused_by_name(finished):
    before = stamps(finished.folder)
    with pytest.raises(SystemExit) as refusal:
        rerun(finished.folder, *SMALL, "--balance_rule", "none", "--seed", "7", "--teacher_runs", "2")
    message = str(refusal.value)
    assert (
        "seed: 42 -> 7" in message
        and "teacher_runs: 1 -> 2" in message
        and "balance_rule: flip_maxgrad -> none" in message
    )
    assert "--overwrite" in message and "--output_dir" in message
    assert stamps(finished.folder) == before


def test_options_without_influence_on_the_result_may_change(finished):
    rerun(finished.folder, *SMALL, "--logging_steps", "5", "--save_steps", "7")


def test_overwrite_redoes_only_the_stages_concerned(copied):
    before = stamps(copied)
    rerun(copied, *SMALL, "--packed_dtype", "float16", "--overwrite")
    after = stamps(copied)
    kept = [name for name in before if name.startswith(("teacher/", "latent/"))]
    assert all(after[name] == before[name] for name in kept)
    results = read_json(copied / "results.json")
    assert results["bytes"]["packed"] < 0.6 * (copied / "teacher" / "model.safetensors").stat().st_size / 4
    assert results["scores"]["packed"]["accuracy"] == pytest.approx(accuracy(copied / "packed"))
    assert 0 < results["max_logit_difference"] < 0.05


def test_run_stopped_before_the_report_is_completed(copied):
    results = read_json(copied / "results.json")
    (copied / "results.json").unlink()
    (copied / "packed" / "README.md").unlink()
    rerun(copied, *SMALL)
    again = read_json(copied / "results.json")
    assert [again[key] for key in ("scores", "bytes", "seconds")] == [
        results[key] for key in ("scores", "bytes", "seconds")
    ]
    assert (copied / "packed" / "README.md").is_file()


def test_failure_leaves_no_results(copied, monkeypatch):
    monkeypatch.setattr(recipe_stages, "pack_student", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rerun(copied, *SMALL, "--packed_dtype", "float16", "--overwrite")
    assert not (copied / "results.json").exists()
    assert RunFolder(copied).record("packed") is None


@pytest.mark.slow
def test_killed_distillation_continues_to_the_same_weights(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(folder, *SMALL)
    while newest_checkpoint(folder / "latent") is None:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "results.json").exists() and RunFolder(folder).record("latent") is None
    teacher = stamps(folder / "teacher")

    (folder / "latent" / "checkpoint-119").mkdir()  # as if the kill had come while it was written
    rerun(folder, *SMALL)
    assert "continuing from step" in capsys.readouterr().out
    assert stamps(folder / "teacher") == teacher
    for stage in STAGES:
        expected, found = weights(finished.folder / stage), weights(folder / stage)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), stage
    assert read_json(folder / "results.json")["scores"] == finished.results["scores"]


def test_killed_after_the_last_step_trains_no_more(copied, tmp_path, capsys):
    """The last checkpoint is complete, but the stage was not: only what comes after the training is repeated."""
    run, expected = RunFolder(copied), weights(copied / "latent")
    checkpoint = copied / "latent" / f"checkpoint-{STEPS}"
    shutil.copytree(copied / "latent", tmp_path / "latent")
    shutil.rmtree(copied / "latent")
    shutil.copytree(tmp_path / "latent", checkpoint)
    for stage in ("latent", "packed"):
        (copied / "stages" / f"{stage}.json").unlink()
    (copied / "results.json").unlink()
    rerun(copied, *SMALL)
    assert "continuing" not in capsys.readouterr().out
    found = weights(copied / "latent")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert run.record("latent")["steps"] == STEPS and not checkpoint.exists()


@pytest.mark.slow
def test_two_processes_train_the_same_model(finished, tmp_path):
    folder = tmp_path / "run"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    shutil.copytree(finished.folder / "teacher", tmp_path / "given")
    options = ["--teacher", str(tmp_path / "given"), *SMALL]
    options[options.index("--max_steps") + 1] = "10"
    output, errors = run_script(folder, *options, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert len(re.findall("Map:   0%", errors)) == 2, "each split became tokens in one process only"
    assert not list(folder.rglob("*.draft"))
    results = read_json(folder / "results.json")
    assert output.count("packed: started") == 1 and results["processes"] == 2
    typed = shlex.join(["recipes/glue.py", "--output_dir", str(folder), *options])
    assert results["command"] == f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 {typed}"
    assert results["command"] in (folder / "packed" / "README.md").read_text()
    assert results["scores"]["packed"]["accuracy"] == pytest.approx(accuracy(folder / "packed"))
    assert results["scores"]["teacher"] == finished.results["scores"]["teacher"]

    rerun(tmp_path / "alone", *options)
    losses = [losses_of(run / "latent") for run in (folder, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def losses_of(folder: Path) -> list[float]:
    """The logged losses of a training."""
    return [log["loss"] for log in read_json(folder / STATE_FILE)["log_history"] if "loss" in log]


# ------------------------------------------------------------------------------------------- the average of teachers

FEW = ["--max_train_samples", "128", "--max_eval_samples", "100", "--teacher_epochs", "1", "--logging_steps", "1"]
FEW += ["--save_steps", "2", "--max_steps", "2"]  # four steps for each teacher, two for the student


def teacher(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """The weights of the teacher that these options make."""
    ablation_teacher.main(["--output_dir", str(folder), *FEW, *options])
    return weights(folder / "teacher")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=within, msg=name)


def test_a_single_fine_tuning_is_that_of_the_seed(finished, tmp_path):
    """The teacher of the demo once more, by the Trainer itself."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "teacher")
    rows = demo_dataset()["train"].select(range(EXAMPLES)).rename_column("label", "labels")
    set_seed(42)
    trainer = FineTuningTrainer(
        model=BertForSequenceClassification(demo_model_config(len(tokenizer))),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=get_task("demo").teacher_learning_rate,
            warmup_steps=0.06,
            seed=42,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=rows.map(tokenizer, input_columns="sentence1", remove_columns=["sentence1"]),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    assert_equal(weights(finished.folder / "teacher"), {k: v.cpu() for k, v in trainer.model.state_dict().items()})
    assert "teacher_run_scores" not in finished.results and "average" not in finished.output


def test_the_average_is_the_mean_of_fine_tunings_with_the_next_seeds(finished, tmp_path):
    """From a model with a head all seeds start alike, and the members can be made one by one."""
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "teacher")
    config = demo_model_config(len(tokenizer))
    config.initializer_range = 0.3  # large weights answer at random, and each member otherwise
    set_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = ["--model_name_or_path", str(tmp_path / "model")]
    average = teacher(tmp_path / "average", *model, "--teacher_runs", "3")
    members = [teacher(tmp_path / str(seed), *model, "--seed", str(seed)) for seed in (42, 43, 44)]
    assert not torch.equal(members[0]["classifier.weight"], members[1]["classifier.weight"])
    for name in average:
        mean = np.mean([member[name].double().numpy() for member in members], axis=0)
        np.testing.assert_array_equal(average[name].numpy(), mean.astype(np.float32), err_msg=name)
    scores = [RunFolder(tmp_path / str(seed)).record("teacher")["scores"] for seed in (42, 43, 44)]
    assert RunFolder(tmp_path / "average").record("teacher")["run_scores"] == scores
    assert len({score["accuracy"] for score in scores}) > 1


def test_fine_tunings_start_from_the_same_head(tmp_path):
    """Where they learn nothing, their average is what they started from."""
    nothing = ["--teacher_learning_rate", "1e-30"]
    average = teacher(tmp_path / "average", *nothing, "--teacher_runs", "2")
    assert_equal(average, teacher(tmp_path / "single", *nothing), within=1e-20)


def test_mean_by_hand():
    states = [{"w": torch.tensor([x, y]), "n": torch.tensor(n)} for x, y, n in ((1e8, 1, 5), (1, 2, 8), (-1e8, 6, 9))]
    mean = mean_weights(states)
    assert torch.equal(mean["w"], torch.tensor([1 / 3, 3])), "in float32 the 1 would be lost beside 1e8"
    assert mean["n"] == torch.tensor(5), "integers count something: no mean"


@pytest.fixture(scope="module")
def soup(tmp_path_factory) -> SimpleNamespace:
    """A complete run whose teacher is the average of two fine-tunings."""
    folder = tmp_path_factory.mktemp("soup") / "run"
    rerun(folder, *FEW, "--teacher_runs", "2")
    return SimpleNamespace(folder=folder, results=read_json(folder / "results.json"))


def test_an_average_is_reported_with_the_scores_of_its_fine_tunings(soup, capsys):
    results, folder = soup.results, soup.folder / "teacher"
    scores = [run["accuracy"] for run in results["teacher_run_scores"]]
    assert len(scores) == 2 and results["steps"]["teacher"] == 2 * 4
    rerun(soup.folder, *FEW, "--teacher_runs", "2")
    sentence = f"The teacher is the average of 2 fine-tunings: accuracy {scores[0]:.4f}, {scores[1]:.4f}."
    assert sentence in capsys.readouterr().out
    assert sentence in (soup.folder / "packed" / "README.md").read_text()
    assert len(list(folder.rglob("*.safetensors"))) == 1, "of the members only the logs stay"
    assert [len(losses_of(folder / f"run-{number}")) for number in (1, 2)] == [4, 4]


def test_interrupted_fine_tunings_continue_to_the_same_average(soup, tmp_path, monkeypatch):
    """Interrupted in the second one, and again when the average is written but the stage is not complete."""
    steps = []

    def note(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            steps.append((Path(args.output_dir).name, state.global_step))
        if steps.count(("run-2", 3)) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(CompactProgress, "on_log", note)
    with pytest.raises(KeyboardInterrupt):
        teacher(tmp_path, "--teacher_runs", "2")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunFolder, "complete", lambda *_: 1 / 0)
        teacher(tmp_path, "--teacher_runs", "2")
    assert_equal(teacher(tmp_path, "--teacher_runs", "2"), weights(soup.folder / "teacher"))
    first, second, continued = [("run-1", n) for n in (1, 2, 3, 4)], [("run-2", n) for n in (1, 2, 3)], [("run-2", 4)]
    assert steps == [*first, *second, *second[-1:], *continued], "the last command trains nothing"
    record, expected = (RunFolder(folder).record("teacher") for folder in (tmp_path, soup.folder))
    assert [record[key] for key in ("steps", "run_scores", "scores")] == [
        expected[key] for key in ("steps", "run_scores", "scores")
    ]


# ---------------------------------------------------------------------------------- a step in parts, and in less memory

MEANS = ["--hidden_weight", "0", "--label_weight", "1", "--logits_loss", "mse"]  # means over examples, however split


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of a few steps, each of a whole batch."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    rerun(folder, *FEW, *MEANS)
    return folder


def logged(folder: Path, stage: str) -> list[tuple[float, float]]:
    """Loss and norm of the gradients in every step."""
    history = read_json(folder / stage / STATE_FILE)["log_history"]
    return [(log["loss"], log["grad_norm"]) for log in history if "loss" in log]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(parts, plain, tmp_path):
    """The same examples in every step, and the mean of their losses, to rounding."""
    rerun(tmp_path, *FEW, *MEANS, "--gradient_accumulation_steps", str(parts))
    assert read_json(tmp_path / "results.json")["steps"] == read_json(plain / "results.json")["steps"]
    for stage in ("teacher", "latent"):
        expected, found = logged(plain, stage), logged(tmp_path, stage)
        assert len(found) == len(expected) > 1
        np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=stage)
        assert_equal(weights(tmp_path / stage), weights(plain / stage), within=2e-5)


def test_parts_belong_to_the_settings(plain):
    with pytest.raises(SystemExit, match="gradient_accumulation_steps: 1 -> 2"):
        rerun(plain, *FEW, *MEANS, "--gradient_accumulation_steps", "2")
    with pytest.raises(SystemExit, match=r"--batch_size 6 .* must be a multiple of 1 x 4, their numbers"):
        rerun(plain, *FEW, *MEANS, "--batch_size", "6", "--gradient_accumulation_steps", "4")


def test_activations_that_are_computed_again_change_nothing(plain, tmp_path, monkeypatch):
    calls, forward = [], BertIntermediate.forward
    monkeypatch.setattr(
        BertIntermediate, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    rerun(tmp_path / "plain", *FEW, *MEANS)
    count = len(calls)
    rerun(tmp_path / "again", *FEW, *MEANS, "--gradient_checkpointing")
    layers = demo_model_config(10).num_hidden_layers
    assert len(calls) - 2 * count == (4 + 2) * layers, "once more in each step of teacher and student"
    for stage in STAGES:
        assert_equal(weights(tmp_path / "again" / stage), weights(plain / stage))
    rerun(plain, *FEW, *MEANS, "--gradient_checkpointing")  # no setting: nothing is done again


# ------------------------------------------------------------------------------------------- an adapter on the bits

LORA = ["--lora", "4", "--lora_learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory) -> SimpleNamespace:
    """The complete run, continued by an adapter."""
    folder = Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("adapted") / "run"))
    before = stamps(folder)
    rerun(folder, *SMALL, *LORA)
    return SimpleNamespace(folder=folder, before=before, results=read_json(folder / "results.json"))


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_an_adapter_is_added_to_a_finished_run(finished, adapted):
    after = stamps(adapted.folder)
    changed = {name for name in adapted.before if after[name] != adapted.before[name]}
    pictures = {"oscillation.png", "epoch_flips.png", "weights.png"}
    assert changed == {"settings.json", "results.json", "packed/README.md", *pictures}
    results, tensors = adapted.results, adapter_weights(adapted.folder)
    assert results["bytes"]["adapter"] == (adapted.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert results["adapter"] == {"rank": 4, "parameters": sum(tensor.numel() for tensor in tensors.values())}
    assert results["steps"]["adapter"] == STEPS and results["seconds"]["adapter"] > 0
    assert {stage: results["scores"][stage] for stage in STAGES} == {
        stage: finished.results["scores"][stage] for stage in STAGES
    }
    losses = losses_of(adapted.folder / "adapter")
    assert losses[-1] < losses[0], "by the losses of the student"
    assert not list(adapted.folder.rglob("checkpoint-*"))


def test_the_adapter_scores_what_it_scores_on_the_packed_folder(adapted):
    folder = adapted.folder
    rows, tokenizer = demo_dataset()["validation"][:EVALUATED], AutoTokenizer.from_pretrained(folder / "adapter")
    inputs = tokenizer(rows["sentence1"], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "packed")
    with torch.no_grad():
        plain = base(**inputs).logits
        logits = PeftModel.from_pretrained(base, folder / "adapter")(**inputs).logits
        again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")(**inputs).logits
    right = (logits.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()
    assert adapted.results["scores"]["adapter"]["accuracy"] == pytest.approx(right)
    assert torch.equal(logits, again) and (logits - plain).abs().max() > 1e-4


def test_an_adapter_is_reported_with_its_base(adapted, capsys):
    results = adapted.results
    before = stamps(adapted.folder)
    rerun(adapted.folder, *SMALL, *LORA)
    assert {name for name, stamp in stamps(adapted.folder).items() if stamp != before.get(name)} == {"settings.json"}
    output = capsys.readouterr().out
    assert output.count("already complete") == 4
    together = (results["bytes"]["packed"] + results["bytes"]["adapter"]) / 1e6
    row = f"| packed + adapter | {results['scores']['adapter']['accuracy']:.4f}"
    numbers = f"LoRA of rank 4: {results['adapter']['parameters']:,} trained parameters"
    cards = [(adapted.folder / stage / "README.md").read_text() for stage in ("packed", "adapter")]
    for text in (output, *cards):
        line = next(line for line in text.splitlines() if line.startswith(row))
        assert f"{together:.2f}" in line and numbers in text
    card = ModelCard.load(adapted.folder / "adapter" / "README.md")
    assert card.data.library_name == "peft" and results["command"] in card.text


def test_another_adapter_is_refused_by_name_and_redone_alone(adapted, tmp_path):
    before = stamps(adapted.folder)
    for options, change in (([], "lora: 4 -> None"), (["--lora", "2", *LORA[2:]], "lora: 4 -> 2")):
        with pytest.raises(SystemExit, match=change):
            rerun(adapted.folder, *SMALL, *options)
    assert stamps(adapted.folder) == before
    folder = Path(shutil.copytree(adapted.folder, tmp_path / "copy"))
    kept = {name: stamp for name, stamp in stamps(folder).items() if name.split("/")[0] in STAGES}
    rerun(folder, *SMALL, "--overwrite")
    assert not (folder / "adapter").exists() and "adapter" not in read_json(folder / "results.json")["scores"]
    after = stamps(folder)
    assert [name for name in kept if after[name] != kept[name]] == ["packed/README.md"]


def test_an_interrupted_adapter_continues_to_the_same_weights(adapted, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(adapted.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "adapter")
    (folder / "stages" / "adapter.json").unlink()
    (folder / "results.json").unlink()

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == STEPS // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", interrupt)
        rerun(folder, *SMALL, *LORA)
    assert newest_checkpoint(folder / "adapter") is not None
    rerun(folder, *SMALL, *LORA)
    assert_equal(adapter_weights(folder), adapter_weights(adapted.folder))
    assert read_json(folder / "results.json")["scores"] == adapted.results["scores"]


def test_an_adapter_on_a_fully_binary_base_in_half_precision(finished, tmp_path):
    """With the losses of BiBERT, which look at queries, keys and values inside the adapters."""
    options = [*custom_files(tmp_path), "--teacher", str(finished.folder / "teacher"), "--max_steps", "2", "--lora"]
    options += ["--preset", "rebnn-bibert-w1a1", "--packed_dtype", "float16", "--augment", "1", "--license", "mit"]
    rerun(tmp_path / "run", *options)
    results = read_json(tmp_path / "run" / "results.json")
    assert results["adapter"]["rank"] == 8 and results["steps"] == {"latent": 2, "adapter": 2}
    log = read_json(tmp_path / "run" / "adapter" / STATE_FILE)["log_history"]
    assert "loss_relations" in log[0] and not any("flip" in name for name in log[0])
    packed, adapter = (
        ModelCard.load(tmp_path / "run" / stage / "README.md").data.to_dict() for stage in ("packed", "adapter")
    )
    assert (packed["base_model"], packed["base_model_relation"], packed["license"]) == ("teacher", "quantized", "mit")
    assert adapter["license"] == "mit" and "base_model" not in adapter, "what the packed model will be called"


# ------------------------------------------------------------------------------------------------- data and mistakes


def test_without_network_it_exits_with_one_sentence(tmp_path):
    process = start(tmp_path / "run", "--task", "sst2", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "--data_dir" in errors and "Traceback" not in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_missing_model_exits_with_one_sentence_and_leaves_nothing(tmp_path):
    files = custom_files(tmp_path)
    with pytest.raises(SystemExit, match="no/such-model cannot be loaded"):
        rerun(tmp_path / "run", *files, "--model_name_or_path", "no/such-model")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_the_hub_without_safetensors_is_refused_with_the_remedy(finished, tmp_path):
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub", {})
    hub.repos["user/pickled"] = Repo()
    contents = {path.name: path.read_bytes() for path in (finished.folder / "teacher").glob("*.json")}
    contents |= {"pytorch_model.bin": b"a pickle"}
    hub.repos["user/pickled"].commit("main", {name: hub.store(text) for name, text in contents.items()}, "all")
    options = [*custom_files(tmp_path), "--teacher", "user/pickled"]
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with serving(hub) as url:
        process = start(tmp_path / "run", *options, HF_ENDPOINT=url, **settings)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "--teacher user/pickled has no safetensors file" in errors and "save_pretrained(FOLDER)" in errors
    assert not (tmp_path / "run").exists()
    assert not any(request.endswith("pytorch_model.bin") for request in hub.requests)


def custom_files(folder: Path) -> list[str]:
    rows = demo_dataset(train_size=64, validation_size=32)
    options = []
    for split, limit in (("train", 64), ("validation", 32), ("test", 5)):
        examples = rows["validation" if split == "test" else split][:limit]
        names = ["negative", "positive"]
        pairs = zip(examples["sentence1"], examples["label"], strict=True)
        lines = [json.dumps({"text": sentence, "label": names[label]}) for sentence, label in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        options += [f"--{split}_file", str(folder / f"{split}.jsonl")]
    return options


@pytest.mark.parametrize(
    ("processes", "threads", "cores", "hint"),
    [(1, 1, 8, 8), (2, 1, 8, 4), (3, 2, 8, 2), (1, 8, 8, None), (4, 2, 8, None), (1, 1, None, None)],
)
def test_cores_that_are_left_idle_are_named_with_the_remedy(processes, threads, cores, hint, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    hint_at_idle_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=processes, print=print))
    said = capsys.readouterr().out
    launch = "accelerate launch"
    if processes > 1:
        launch = f"ACCELERATE_USE_CPU=true {launch} --multi_gpu --num_processes {processes}"
    assert (f": {launch} --num_cpu_threads_per_process {hint} uses them\n" in said) if hint else not said


def test_idle_cores_do_not_matter_on_another_device(capsys):
    hint_at_idle_cores(SimpleNamespace(device=torch.device("cuda"), num_processes=1, print=print))
    assert not capsys.readouterr().out


def test_files_of_ones_own_with_a_given_teacher(finished, tmp_path, capsys):
    given = finished.folder / "teacher"
    rerun(tmp_path / "run", *custom_files(tmp_path), "--teacher", str(given), "--max_steps", "2", "--bf16")
    assert "custom: single sentences, 2 classes (negative, positive)" in capsys.readouterr().out.splitlines()
    results = read_json(tmp_path / "run" / "results.json")
    assert results["task"] == "custom" and results["examples"] == {"train": 64, "validation": 32, "test": 5}
    assert results["steps"] == {"latent": 2} and not (tmp_path / "run" / "teacher").exists()
    assert results["bytes"]["teacher"] == finished.results["bytes"]["teacher"]
    (submission,) = (tmp_path / "run" / "predictions").iterdir()
    lines = submission.read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 6
    assert {line.split("\t")[1] for line in lines[1:]} <= {"negative", "positive"}


CARRIED = ["--stage_activation_scales", "carry", "--stage_teacher", "previous", "--packed_dtype", "float16"]
STAGED = ["--preset", "rebnn-bit-w1a1", "--stages", "rebnn-bit-w1a2", "--max_steps", "3"]


def test_stages_continue_one_another_and_the_last_is_packed(finished, tmp_path):
    options = [*custom_files(tmp_path), "--teacher", str(finished.folder / "teacher"), *STAGED]
    rerun(tmp_path / "run", *options, *CARRIED)
    results = read_json(tmp_path / "run" / "results.json")
    assert results["steps"] == {"stage-1": 3, "latent": 3}
    assert results["bytes"]["packed"] < results["bytes"]["latent"] / 8 and results["max_logit_difference"] < 1
    first, last = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / stage) for stage in ("stage-1", "latent")
    )
    methods = [model.config.quantization_config for model in (first, last)]
    assert [method.activation_bits for method in methods] == [2, 1]
    # Three steps of 1e-3 each: the second stage starts from the first, not from the teacher.
    name = "bert.encoder.layer.0.output.dense"
    moved = (last.get_submodule(name).weight - first.get_submodule(name).weight).abs().max().item()
    assert 0 < moved <= 3.1e-3
    before = stamps(tmp_path / "run")
    rerun(tmp_path / "run", *options, *CARRIED)
    assert {name for name, stamp in stamps(tmp_path / "run").items() if stamp != before.get(name)} <= {"settings.json"}
    with pytest.raises(SystemExit, match="stages"):
        rerun(tmp_path / "run", *[word for word in options if word not in ("--stages", "rebnn-bit-w1a2")])


@pytest.mark.parametrize(
    "preset, backends",
    [
        ("rebnn-bit-w1a1", ["reference", "reference", "cpu", "reference"]),
        ("rebnn-w1a32", ["reference", "reference", "cpu"]),
    ],
)
def test_few_bit_students_are_compared_with_their_packed_form_where_rounding_is_the_same(
    preset, backends, finished, tmp_path, monkeypatch
):
    """The engine rounds at other places than training, and one flipped bit is more than any tolerance allows."""
    if not kernels.cpu.available():
        pytest.skip(kernels.cpu.why_not())
    used, validate = [], GlueJob.validate
    monkeypatch.setattr(GlueJob, "validate", lambda *job: (used.append(kernels.backend()), validate(*job))[1])
    options = [*custom_files(tmp_path), "--teacher", str(finished.folder / "teacher"), "--preset", preset]
    rerun(tmp_path / "run", *options, "--max_steps", "2")
    assert used == ["cpu", *backends], "the teacher; latent, packed in memory; reloaded"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stages", "rebnn-bit-w1a2"], "pass the preset of the last stage too"),
        (["--stages", "rebnn-bit-w1a2", "--preset", "rebnn-bibert-w1a1"], "the stages differ in ffn_activation"),
        (["--stages", "rebnn-bit-w1a1", "--preset", "rebnn-w1a32"], "reverse the order|differ in ffn_activation"),
        (["--stages", "bit-w1a2", "--preset", "bit", "--activation_bits", "1"], "would hold for every stage"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_training(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_glue_arguments(options)
    assert re.search(message, capsys.readouterr().err)
    parse_glue_arguments(["--stages", "rebnn-w1a32", "bit-w1a2", "--preset", "bit"])


def test_what_is_said_of_other_architectures_can_be_done(tmp_path):
    """Each way out that the message names is an option of the recipe, and passes the same check."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=300, **shape)).save_pretrained(tmp_path)

    def check(*options: str) -> None:
        arguments = parse_glue_arguments(["--model_name_or_path", str(tmp_path), *options])
        run = RunFolder(tmp_path / "run")
        check_architecture(GlueJob(arguments, None, None, None, run, run.folder("teacher"), None))

    with pytest.raises(SystemExit) as refused:
        check("--preset", "rebnn-bit-w1a1")
    said = str(refused.value)
    assert "attention='softmax' with ffn_activation='model' works on every architecture" in said
    assert "preset 'rebnn-elastic-w1a1'" in said and "Fields are options of the same name: --attention softmax" in said
    check("--preset", "rebnn-bit-w1a1", "--attention", "softmax", "--ffn_activation", "model")
    check("--preset", "rebnn-elastic-w1a1")


def test_an_architecture_that_cannot_be_binarized_is_refused_before_its_teacher_is_trained(finished, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=300, **shape)).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(finished.folder / "teacher").save_pretrained(tmp_path / "encoder")
    options = [*custom_files(tmp_path), "--model_name_or_path", str(tmp_path / "encoder")]
    with pytest.raises(
        SystemExit, match=r"cannot be binarized as asked: attention='elastic' and ffn_activation='relu'"
    ):
        rerun(tmp_path / "run", *options, "--preset", "rebnn-bit-w1a1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["bit-released", "bibert-released"])
def test_signs_of_three_values_are_scored_and_not_packed(preset, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [*custom_files(tmp_path), "--teacher", str(finished.folder / "teacher"), "--preset", preset]
    options += ["--max_steps", "2"]
    rerun(folder, *options)
    results = read_json(folder / "results.json")
    assert results["not_packed"].startswith("ties='released' has sign(0) = 0, a third value")
    assert not {"ratio", "max_logit_difference", "size"} & set(results)
    assert set(results["scores"]) == set(results["bytes"]) == {"teacher", "latent"}
    assert results["config"]["ties"] == "released" and results["config"]["state"] == "latent"
    latent = AutoModelForSequenceClassification.from_pretrained(folder / "latent")
    tokenizer, rows = AutoTokenizer.from_pretrained(folder / "latent"), demo_dataset(64, 32)["validation"][:32]
    with torch.no_grad():
        logits = latent(**tokenizer(rows["sentence1"], padding=True, return_tensors="pt")).logits
    right = (logits.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()
    assert results["scores"]["latent"]["accuracy"] == pytest.approx(right)
    assert not (folder / "packed").exists() and len(list((folder / "predictions").iterdir())) == 1
    output = capsys.readouterr().out
    assert "| latent" in output and "There is no packed model: ties='released'" in output
    before = stamps(folder)
    rerun(folder, *options)
    assert {name for name, stamp in stamps(folder).items() if stamp != before.get(name)} == {"settings.json"}


def test_mnli_answers_the_diagnostic_set_too(finished, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "teacher")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    rows = [f"{index}\tgood\tbad\t{label}" for index, label in enumerate(get_task("mnli").labels)]
    files = {f"MNLI/{name}.tsv": "gold_label" for name in ("train", "dev_matched", "dev_mismatched")}
    files |= {"MNLI/test_matched.tsv": "x", "MNLI/test_mismatched.tsv": "x", "AX/AX.tsv": "x"}
    for file, label in files.items():
        (tmp_path / "glue" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "glue" / file).write_text("\n".join([f"index\tsentence1\tsentence2\t{label}", *rows]) + "\n")
    options = ["--task", "mnli", "--data_dir", str(tmp_path / "glue"), "--teacher_epochs", "1", "--epochs", "1"]
    rerun(tmp_path / "run", *options, "--model_name_or_path", str(tmp_path / "encoder"))
    submissions = tmp_path / "run" / "predictions"
    assert {path.name for path in submissions.iterdir()} == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    lines = (submissions / "AX.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:]} <= set(get_task("mnli").labels)


def test_teacher_inside_the_output_folder_is_refused(finished):
    with pytest.raises(SystemExit, match="lies in --output_dir"):
        rerun(finished.folder, *SMALL, "--teacher", str(finished.folder / "teacher"), "--overwrite")
    assert (finished.folder / "teacher" / "model.safetensors").exists()


def test_teacher_for_other_labels_is_refused(finished):
    teacher = AutoModelForSequenceClassification.from_pretrained(finished.folder / "teacher")
    with pytest.raises(SystemExit, match="has 2 outputs, but mnli needs 3"):
        check_labels(teacher, get_task("mnli"))
    teacher.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    with pytest.raises(SystemExit, match="order"):
        check_labels(teacher, get_task("sst2"))
    teacher.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    check_labels(teacher, get_task("sst2"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--task", "snli"], "invalid choice"),
        (["--train_file", "a.csv"], "--validation_file"),
        (["--test_file", "a.csv"], "--train_file"),
        (["--task", "rte", "--train_file", "a.csv", "--validation_file", "b.csv"], "--task"),
        (["--balance_rule", "sometimes"], "invalid choice"),
        (["--balance_rule", "const", "--balance_value", "-1"], "must be"),
        (["--learning", "1"], "unrecognized"),
        (["--temperature", "0"], "--temperature 0.0 must be greater than 0"),
        (["--teacher_epochs", "-1"], "--teacher_epochs -1.0 must be greater than 0"),
        (["--teacher_runs", "0"], "--teacher_runs 0 must be greater than 0"),
        (["--save_steps", "0"], "--save_steps 0 must be greater than 0"),
        (["--hidden_weight", "-1"], "--hidden_weight -1.0 must not be negative"),
        (["--warm_up", "1"], "is a share of the steps"),
        (["--lora", "0"], "--lora 0 must be greater than 0"),
        (["--lora", "--lora_epochs", "-1"], "--lora_epochs -1.0 must be greater than 0"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_glue_arguments(options)
    assert complaint in capsys.readouterr().err


def test_every_weight_rule_can_be_reached():
    bit = ["--weight_scale", "mean_abs", "--scale_granularity", "tensor", "--weight_center", "tensor"]
    bit += ["--weight_ste", "identity", "--ste_slope", "unit", "--balance_rule", "none"]
    bit += ["--modules_to_not_convert", "layer.0", "query"]
    config = parse_glue_arguments(bit).binary.config()
    assert (config.weight_ste, config.ste_slope, config.scale_granularity) == ("identity", "unit", "tensor")
    assert config.modules_to_not_convert == ["layer.0", "query"]


def test_options_left_out_take_the_defaults_of_the_task():
    arguments = parse_glue_arguments(["--task", "cola", "--epochs", "3"])
    task = get_task("cola")
    arguments.fill_in(task)
    assert arguments.student.epochs == 3 and arguments.student.batch_size == task.batch_size
    assert arguments.student.learning_rate == task.student_learning_rate
    assert arguments.teacher.model_name_or_path == "google-bert/bert-base-uncased"
    assert arguments.run.output_dir == "runs/cola"
    assert arguments.student_settings("latent")["hidden_weight"] == 1.0
    assert arguments.student.activation_learning_rate == 10 * task.student_learning_rate


def test_an_adapter_takes_rank_8_and_the_epochs_of_the_student():
    arguments = parse_glue_arguments(["--task", "cola", "--epochs", "3", "--lora"])
    arguments.fill_in(get_task("cola"))
    assert (arguments.adapter.lora, arguments.adapter.lora_epochs) == (8, 3)
    assert parse_glue_arguments(["--task", "cola"]).stage_settings("")["adapter"] == {}


def test_a_preset_sets_method_and_losses_and_options_override_it():
    arguments = parse_glue_arguments(["--preset", "bibert", "--balance_rule", "flip_maxgrad", "--label_weight", "0.25"])
    config = arguments.binary.config()
    assert (config.activation, config.attention, config.weight_center) == ("sign", "bool", "row")
    assert config.balance_rule == "flip_maxgrad"
    arguments.fill_in(get_task("rte"))
    settings = arguments.student_settings("latent")
    assert (settings["hidden_loss"], settings["label_weight"], settings["relation_weight"]) == ("direction", 0.25, 1.0)
    assert settings["preset"] == "bibert" and settings["activation"] == "sign"


def test_stages_are_named_in_order_and_each_has_the_method_of_its_preset():
    arguments = parse_glue_arguments(["--preset", "rebnn-bit-w1a1", "--stages", "rebnn-bit-w1a4", "rebnn-bit-w1a2"])
    stages = [(stage.name, stage.preset, stage.previous) for stage in arguments.distillations()]
    assert stages == [
        ("stage-1", "rebnn-bit-w1a4", None),
        ("stage-2", "rebnn-bit-w1a2", "stage-1"),
        ("latent", "rebnn-bit-w1a1", "stage-2"),
    ]
    arguments.fill_in(get_task("rte"))
    bits = [settings.get("activation_bits") for settings in arguments.stage_settings("").values()]
    assert bits == [None, 4, 2, 1, None, None], "nor do the packed model and its adapter train any"


def test_packed_model_that_answers_differently_is_not_reported():
    logits = {"validation": np.array([[2.0, -1.0]], dtype=np.float32)}
    check_equal(logits, logits, torch.float32)
    assert largest_difference(logits, {"validation": logits["validation"] + 0.5}) == 0.5
    for wrong in (1.0, float("nan")):
        with pytest.raises(RuntimeError, match="does not answer like"):
            check_equal(logits, {"validation": logits["validation"] + wrong}, torch.float32)
