"""The same command gives the same files, bit for bit, and says what it depended on."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rebnn_hf

ROOT = Path(__file__).parents[1]
TINY = ["--max_train_samples", "64", "--max_eval_samples", "40", "--teacher_epochs", "1", "--max_steps", "8"]
TIMED = ("seconds", "finished", "command")
"""Entries of results.json that may differ: times, and the command, which names the folder."""


def run_demo(folder, *options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, ROOT / "recipes" / "glue.py", "--output_dir", folder, *TINY, "--logging_steps", "4"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    for name in TIMED:
        results.pop(name)
    results["arguments"].pop("output_dir")
    return results


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Folders and results of two runs in processes of their own."""
    folders = [tmp_path_factory.mktemp("run") / name for name in ("first", "second")]
    return [(folder, run_demo(folder)) for folder in folders]


def test_the_same_seed_gives_the_same_results(twice):
    (_, first), (_, second) = twice
    assert first == second
    assert {"latent", "packed"} <= first["scores"].keys() and first["oscillation"]["flips_per_weight"] > 0


def test_the_same_seed_gives_the_same_files(twice):
    def digests(folder):
        return {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for stage in ("teacher", "latent", "packed")
            for file in sorted((folder / stage).iterdir())
            if file.suffix in (".safetensors", ".json") and file.name != "trainer_state.json"
        }

    first, second = (digests(folder) for folder, _ in twice)
    assert {f"{stage}/model.safetensors" for stage in ("teacher", "latent", "packed")} <= first.keys()
    assert first == second


def test_another_seed_gives_another_model(twice, tmp_path):
    """Otherwise equality above would say nothing."""
    other = run_demo(tmp_path / "run", "--seed", "7")
    files = [folder / "packed" / "model.safetensors" for folder in (twice[0][0], tmp_path / "run")]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert other["config"] == twice[0][1]["config"]


def test_results_say_what_they_depend_on(twice):
    folder, results = twice[0]
    versions = results["versions"]
    assert versions["torch"] == torch.__version__ and versions["rebnn_hf"] == rebnn_hf.__version__
    assert {"python", "transformers", "accelerate", "datasets"} <= versions.keys()
    assert versions["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", versions["git"])
    assert re.fullmatch(r"[0-9a-f]{16}", results["data_digest"])
    assert results["config"] == json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]
    assert results["config"]["balance_rule"] == "flip_maxgrad" and results["config"]["state"] == "packed"
    assert results["seed"] == results["arguments"]["seed"] and results["arguments"]["max_steps"] == 8


def test_other_data_have_another_digest(tmp_path, twice):
    fewer = run_demo(tmp_path / "run", "--max_train_samples", "63")
    assert fewer["data_digest"] != twice[0][1]["data_digest"]
    assert fewer["examples"]["train"] == 63
