"""The commands that README and docs show, as they are typed: by `accelerate launch`, in one process and in two."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_ablation import save_teacher, write_sst2

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from recipe_folder import read_json

from rebnn_hf.checkpoints import STATE_FILE

ROOT = Path(__file__).parents[1]
ONE = "accelerate launch"
TWO = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2"


def launch(typed: str, *options: str | Path) -> tuple[str, dict]:
    """Runs recipes/glue.py behind these words, in this environment's python; what it prints and its results."""
    settings, _, words = typed.partition("accelerate launch")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | dict(word.split("=") for word in settings.split())
    command = [sys.executable, "-m", "accelerate.commands.launch", *words.split(), "recipes/glue.py"]
    done = subprocess.run(
        [*command, *map(str, options)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout, read_json(Path(options[options.index("--output_dir") + 1]) / "results.json")


@pytest.fixture(scope="module", params=[ONE, TWO], ids=["one process", "two processes"])
def launched(request, tmp_path_factory) -> SimpleNamespace:
    """A teacher fine-tuned and distilled by the command of README, from a folder with an encoder and one with data."""
    folder = tmp_path_factory.mktemp("launched")
    write_sst2(folder / "glue" / "SST-2")
    save_teacher(folder / "encoder")
    options = ["--task", "sst2", "--data_dir", folder / "glue", "--model_name_or_path", folder / "encoder"]
    options += ["--output_dir", folder / "run", "--teacher_epochs", "1", "--epochs", "2", "--logging_steps", "1"]
    output, results = launch(request.param, *options)
    return SimpleNamespace(typed=request.param, folder=folder, options=options, output=output, results=results)


def losses(folder: Path) -> list[float]:
    return [log["loss"] for log in read_json(folder / STATE_FILE)["log_history"] if "loss" in log]


@pytest.mark.slow
def test_the_shipped_command_fine_tunes_a_teacher_and_distils_it(launched):
    results, run = launched.results, launched.folder / "run"
    assert results["processes"] == (2 if launched.typed == TWO else 1)
    assert results["steps"] == {"teacher": 64 // 32, "latent": 2 * 64 // 32}
    assert results["examples"] == {"train": 64, "validation": 32}
    assert launched.output.count("teacher: started") == 1 and launched.output.count("| packed") == 1
    assert {path.name for path in run.iterdir()} >= {"teacher", "latent", "packed", "results.json", "oscillation.png"}
    assert not list(run.rglob("*.draft"))


@pytest.mark.slow
def test_any_number_of_processes_takes_the_same_steps(launched, tmp_path, monkeypatch):
    """As those of one process that nothing has launched."""
    import glue
    import torch

    threads = torch.get_num_threads()
    glue.main([*map(str, launched.options), "--output_dir", str(tmp_path)])  # the last one counts
    torch.set_num_threads(threads)
    for stage in ("teacher", "latent"):
        found, expected = losses(launched.folder / "run" / stage), losses(tmp_path / stage)
        assert len(found) == len(expected) >= 2
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_the_command_in_the_results_is_the_one_that_was_typed(launched):
    typed = launched.typed if launched.typed == TWO else "python"
    options = shlex.join(map(str, launched.options))
    assert launched.results["command"] == f"{typed} recipes/glue.py {options}"


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise_which_takes_a_minute(tmp_path):
    """README's first command, with all its examples and steps."""
    output, results = launch(ONE, "--task", "demo", "--output_dir", tmp_path / "run")
    scores = {name: score["accuracy"] for name, score in results["scores"].items()}
    assert scores["teacher"] > scores["bag_of_words"] + 0.2
    assert scores["packed"] >= scores["teacher"] - 0.02
    assert scores["packed"] == scores["latent"] and results["ratio"] > 4
    assert f"| packed       | {scores['packed']:.4f}" in output
