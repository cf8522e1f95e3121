"""Checkpoints are whole or not there: damaged ones, a full disk, the best one, what is left over."""

import contextlib
import os
import resource
import shutil

import pytest
import torch
from test_trainer import Sentences, StopAt, assert_same, bert, latent_state, trainer_for
from transformers import TrainerCallback

import rebnn_hf
from rebnn_hf import ReBNNTrainer, ReBNNTrainingArguments
from rebnn_hf.checkpoints import DRAFT, damage, newest_checkpoint, written_aside

SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def student():
    return rebnn_hf.binarize(bert(seed=1, dropout=0.1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run with checkpoints after 2, 4 and 6 steps, and its last weights."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_for(folder, student(), **SETTINGS)
    trainer.train()
    return folder, latent_state(trainer.model)


@pytest.fixture
def copied(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint-6")
    return folder, trained[1]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: writes fail half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_passed_over(file, copied):
    """The run continues from the one before, to the same weights."""
    folder, expected = copied
    cut(folder / "checkpoint-4" / file)
    assert file in damage(folder / "checkpoint-4") and newest_checkpoint(folder) == folder / "checkpoint-2"
    if file == "optimizer.pt":
        trainer = trainer_for(folder, student(), **SETTINGS)
        trainer.train(resume_from_checkpoint=True)
        assert_same(latent_state(trainer.model), expected)
        assert damage(folder / "checkpoint-4") is None, "written once more"


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(copied):
    folder, _ = copied
    cut(folder / "checkpoint-4" / "optimizer.pt")
    trainer = trainer_for(folder, student(), **SETTINGS)
    with pytest.raises(ValueError, match=r"cannot continue from .*checkpoint-4: optimizer\.pt is cut.*Delete"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / name / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"has no trainer_state\.json, which is written last"):
        trainer.train(resume_from_checkpoint=True)


class FullAt(TrainerCallback):
    """The disk is full from a step on."""

    def __init__(self, step, stack):
        self.step, self.stack = step, stack

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.stack.enter_context(full_disk(8192))


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(trained, tmp_path):
    settings = {**SETTINGS, "save_total_limit": 1}
    with contextlib.ExitStack() as stack:
        trainer = trainer_for(tmp_path, student(), callbacks=[FullAt(4, stack)], **settings)
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written.*[Ff]ile too large"):
            trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2" and not (tmp_path / "checkpoint-4").exists()
    trainer = trainer_for(tmp_path, student(), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert_same(latent_state(trainer.model), trained[1])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_nothing_is_left_over_and_old_checkpoints_are_deleted(tmp_path):
    (tmp_path / DRAFT / "checkpoint-1").mkdir(parents=True)  # of a run that was killed
    trainer_for(tmp_path, student(), **{**SETTINGS, "save_total_limit": 2}).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_the_best_checkpoint_is_known_by_its_name(tmp_path):
    """Also when it is the one just written, whose folder still had another name."""
    arguments = ReBNNTrainingArguments(
        str(tmp_path),
        **{**SETTINGS, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1},
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        plot_oscillation=False,
        use_cpu=True,
    )
    data = Sentences()
    trainer = ReBNNTrainer(model=student(), args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}") and damage(best) is None
    assert DRAFT not in "".join(path.read_text() for path in tmp_path.glob("*/trainer_state.json"))
    saved = type(trainer.model).from_pretrained(best)
    assert_same(latent_state(trainer.model), latent_state(saved))


def test_a_stopped_run_continues_where_it_was(trained, tmp_path):
    trainer_for(tmp_path, student(), callbacks=[StopAt(4)], **SETTINGS).train()
    trainer = trainer_for(tmp_path, student(), **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    assert_same(latent_state(trainer.model), trained[1])


def test_files_written_aside_move_together(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "model").write_text("old")
    with pytest.raises(OSError, match=r"could not be written: .*[Ff]ile too large"), written_aside(tmp_path) as draft:
        (draft / "config").write_text("new")
        with full_disk(10):
            (draft / "model").write_text("new" * 100)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "kept", "model": "old"}
    with written_aside(tmp_path) as draft:
        (draft / "model").write_text("new")
        assert (tmp_path / "model").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "kept", "model": "new"}


def test_a_training_with_nan_stops_before_its_weights_are_spoiled(tmp_path):
    """A teacher with NaN: no step is taken, and what was saved before is good."""
    teacher = bert(seed=2)
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    trainer = trainer_for(tmp_path, student(), teacher=teacher, **SETTINGS)
    before = latent_state(trainer.model)
    with pytest.raises(ValueError, match="holds NaN or infinity, and the step was not taken"):
        trainer.train()
    assert_same(latent_state(trainer.model), before)
