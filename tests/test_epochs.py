"""How many signs an epoch changed: by hand, and in training that is interrupted and continued."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments, binarize
from rebnn_hf.checkpoints import SIGNS_FILE, STATE_FILE, damage
from rebnn_hf.epochs import EpochFlips
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryConv2d, BinaryLinear

EPOCHS, STEPS = 3, 4
DATA = [
    {"pixels": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), "labels": i % 3} for i in range(16)
]


def test_by_hand(tmp_path):
    """10 weights in a row: their bits end within a byte."""
    linear, conv = BinaryLinear(10, 2), BinaryConv2d(1, 1, 2)
    with torch.no_grad():
        linear.weight.fill_(1)
        conv.weight.fill_(-1)
    flips = EpochFlips({"linear": linear, "conv": conv})
    with torch.no_grad():
        linear.weight[0, 0] = linear.weight[1, 9] = linear.weight[1, 3] = -1
        conv.weight[0, 0, 1, 1] = 0  # sign(0) = +1
    assert flips.end_epoch() == {
        "linear": {"weights": 20, "epoch_flip_ratio": 3 / 20},
        "conv": {"weights": 4, "epoch_flip_ratio": 1 / 4},
    }
    flips.save(tmp_path)
    with torch.no_grad():
        linear.weight[0, 0] = 1  # back again; the others stay as they are
    again = EpochFlips({"linear": linear, "conv": conv})
    again.load(tmp_path)
    for continued in (flips, again):
        assert [layer["epoch_flip_ratio"] for layer in continued.end_epoch().values()] == [1 / 20, 0]


def test_signs_are_those_of_centered_rows():
    linear = BinaryLinear(4, 1, rule=WeightRule(center="row"))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    flips = EpochFlips({"linear": linear})
    with torch.no_grad():
        linear.weight[0, 3] = 0.0  # the mean falls from 2.5 to 1.5: 2 is above it now, and 0 below
    assert flips.end_epoch()["linear"]["epoch_flip_ratio"] == 2 / 4


class Classifier(nn.Module):
    """Three convolutions in the form that the Trainer knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.ReLU(), nn.Conv2d(9, 3, 3))

    def forward(self, pixels, labels):
        logits = self.convs(pixels).mean((2, 3))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


LAYERS = ("convs.2", "convs.4")


def trainer_for(folder, **arguments):
    options = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    options |= {"log_oscillation": "layer", "plot_oscillation": False, "save_strategy": "steps", "save_steps": 1}
    options |= {"logging_steps": 5, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **arguments}
    args = ReBNNTrainingArguments(str(folder), **options)
    return ReBNNTrainer(model=binarize(Classifier(), ReBNNConfig()), args=args, train_dataset=DATA)


def epochs_of(trainer):
    return [log for log in trainer.state.log_history if "epoch_flip_ratio" in log]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


def test_ratios_are_those_of_the_checkpoints_at_the_ends_of_epochs(finished):
    folder = finished.args.output_dir
    weights = [dict(Classifier().named_parameters())]
    weights += [load_file(f"{folder}/checkpoint-{STEPS * n}/model.safetensors") for n in range(1, EPOCHS + 1)]
    logs = epochs_of(finished)
    assert [(log["epoch"], log["step"]) for log in logs] == [(n, STEPS * n) for n in range(1, EPOCHS + 1)]
    for log, before, after in zip(logs, weights[:-1], weights[1:], strict=True):
        changed = [(before[f"{name}.weight"] < 0) != (after[f"{name}.weight"] < 0) for name in LAYERS]
        found = [log[f"epoch_flip_ratio/{name}"] for name in LAYERS]
        assert found == pytest.approx([mask.float().mean().item() for mask in changed]) and all(found)
        assert log["epoch_flip_ratio"] == pytest.approx(torch.cat([mask.flatten() for mask in changed]).float().mean())


@pytest.mark.parametrize("step", [STEPS - 1, STEPS, STEPS + 1])
def test_continued_runs_log_the_same_epochs(step, finished, tmp_path):
    again = trainer_for(tmp_path)
    again.train(resume_from_checkpoint=f"{finished.args.output_dir}/checkpoint-{step}")
    assert epochs_of(again) == epochs_of(finished)


def test_an_epoch_whose_start_is_not_known_has_no_ratio(finished, tmp_path):
    """Checkpoints of earlier versions hold no signs."""
    checkpoint = shutil.copytree(f"{finished.args.output_dir}/checkpoint-{STEPS + 1}", tmp_path / "checkpoint-5")
    (checkpoint / SIGNS_FILE).unlink()
    again = trainer_for(tmp_path / "run")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert epochs_of(again) == [epochs_of(finished)[0], epochs_of(finished)[2]]


def test_only_whole_epochs_count_and_layers_are_logged_where_asked(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=STEPS + 1, log_oscillation="total", save_strategy="no")
    trainer.train()
    (log,) = epochs_of(trainer)
    assert not any("/" in name for name in log)


def test_the_log_of_an_epoch_is_not_in_place_of_that_of_its_last_step(tmp_path):
    trainer = trainer_for(tmp_path, logging_steps=1, save_strategy="no")
    trainer.train()
    logged = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert logged == list(range(1, EPOCHS * STEPS + 1))


def test_signs_are_no_weights(finished, tmp_path):
    for name in (STATE_FILE, SIGNS_FILE):
        shutil.copy(f"{finished.args.output_dir}/checkpoint-1/{name}", tmp_path / name)
    assert damage(tmp_path) == "it has no weights"
