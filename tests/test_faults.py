"""The recipe when something goes wrong: kills, a full disk, no permission, vanished data, divergence.

`tests/faults/kills.py` does the first at length: `python tests/faults/kills.py --kills 100 --folder FOLDER`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoints import full_disk
from test_glue_recipe import custom_files, rerun, stamps, weights

from rebnn_hf.checkpoints import STATE_FILE, newest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from recipe_folder import STAGES, RunFolder

SMALL = ["--max_train_samples", "64", "--max_eval_samples", "20", "--teacher_epochs", "1", "--max_steps", "4"]
SMALL += ["--save_steps", "1", "--logging_steps", "1"]
KILLS = Path(__file__).parent / "faults" / "kills.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run of a demo that has learned nothing, but has all files."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    rerun(folder, *SMALL)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def bytes_of(folder):
    return {stage: (folder / stage / "model.safetensors").read_bytes() for stage in STAGES}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_makes_the_same_model(tmp_path):
    command = [sys.executable, str(KILLS), "--kills", "4", "--seed", "3", "--folder", str(tmp_path / "kills")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "damaged checkpoints: none; differences: none" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("stage", ["latent", "packed"])
def test_a_full_disk_leaves_no_results_and_the_same_command_completes_the_run(stage, finished, copied):
    """Also where the folder holds the results of a run that was complete before."""
    run = RunFolder(copied)
    for name in STAGES[STAGES.index(stage) :]:
        (copied / "stages" / f"{name}.json").unlink()
        shutil.rmtree(copied / name)
    with full_disk(60_000), pytest.raises(SystemExit, match=r"is unfinished: .*[Ff]ile too large.*the same command"):
        rerun(copied, *SMALL)
    assert run.results() is None and run.record(stage) is None and run.record("teacher") is not None
    rerun(copied, *SMALL)
    assert bytes_of(copied) == bytes_of(finished)
    assert run.results()["scores"] == RunFolder(finished).results()["scores"]


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--output_dir .*file/run cannot be used: .*Choose another"):
        rerun(tmp_path / "file" / "run", *SMALL)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(SystemExit, match=r"--output_dir .* cannot be used: .*Permission denied"):
        rerun(tmp_path / "run", *SMALL)


def test_data_that_vanished_are_named_and_the_run_continues_when_they_are_back(finished, tmp_path):
    files, run = custom_files(tmp_path), tmp_path / "run"
    options = [*files, "--teacher", str(finished / "teacher"), *SMALL]
    rerun(run, *options)
    expected = weights(run / "packed")
    for left in (run / "results.json", run / "stages" / "packed.json"):  # as if it had been killed
        left.unlink()
    before = stamps(run)
    (tmp_path / "train.jsonl").rename(tmp_path / "away")
    with pytest.raises(SystemExit, match=r"train\.jsonl"):
        rerun(run, *options)
    assert stamps(run) == before
    (tmp_path / "away").rename(tmp_path / "train.jsonl")
    rerun(run, *options)
    assert all((weights(run / "packed")[name] == value).all() for name, value in expected.items())
    assert RunFolder(run).results() is not None


def test_a_teacher_that_diverges_is_not_distilled(tmp_path):
    run = RunFolder(tmp_path)
    options = [*SMALL, "--teacher_learning_rate", "1e30"]
    options[options.index("--teacher_epochs") + 1] = "4"
    for _ in range(2):  # the same command goes on where it stopped, and says the same
        with pytest.raises(SystemExit, match=r"teacher.*The training diverged: pass a lower --learning_rate"):
            rerun(tmp_path, *options)
        assert run.record("teacher") is None and run.results() is None


def test_a_student_that_diverges_is_not_packed(copied):
    run = RunFolder(copied)
    with pytest.raises(ValueError, match="holds NaN or infinity, and the step was not taken"):
        rerun(copied, *SMALL, "--learning_rate", "1e30", "--overwrite")
    assert run.record("teacher") is not None and run.record("latent") is None and run.results() is None


def test_a_cut_checkpoint_is_passed_over(finished, copied):
    """Two checkpoints, the newer one cut: the training goes on from the older one to the same weights."""
    run = RunFolder(copied)
    latent = shutil.copytree(copied / "latent", copied.parent / "latent")
    for name in ("latent", "packed"):
        (copied / "stages" / f"{name}.json").unlink()
        shutil.rmtree(copied / name)
    (copied / "latent" / "checkpoint-3").mkdir(parents=True)
    shutil.copy(latent / STATE_FILE, copied / "latent" / "checkpoint-3")
    cut = (latent / "model.safetensors").read_bytes()[:-100]
    (copied / "latent" / "checkpoint-3" / "model.safetensors").write_bytes(cut)
    assert newest_checkpoint(copied / "latent") is None
    rerun(copied, *SMALL)
    assert bytes_of(copied) == bytes_of(finished) and run.results() is not None
