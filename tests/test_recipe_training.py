"""The order of the examples, and the line of a report."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from recipe_training import LengthGroupedSampler, log_line


def test_sampler_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 60, 1003).tolist()

    def draw(seed: int, epoch: int) -> list[int]:
        return list(LengthGroupedSampler(lengths, 8, lambda: epoch, seed))

    assert sorted(draw(1, 0)) == list(range(1003))
    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(1, 1) and draw(1, 0) != draw(2, 0)
    spreads = [np.ptp([lengths[i] for i in draw(1, 0)[at : at + 8]]) for at in range(0, 1000, 8)]
    assert np.mean(spreads) < 3, "examples of a batch are of similar length"
    means = [np.mean([lengths[i] for i in draw(1, 0)[at : at + 8]]) for at in range(0, 1000, 8)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3, "batches come in no order of length"


def test_processes_share_the_batch_of_one():
    sampler = LengthGroupedSampler(list(range(96)), 8, lambda: 0, 0)
    together = [set(batch) for batch in BatchSampler(sampler, 8, drop_last=False)]
    shares = [BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, process) for process in (0, 1)]
    assert [set(one) | set(two) for one, two in zip(*shares, strict=True)] == together


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_sampler_of_few_examples(size):
    assert sorted(LengthGroupedSampler([5] * size, 8, lambda: 0, 0)) == list(range(size))


def test_log_line_leaves_out_single_layers():
    logs = {"loss": 0.5, "loss_hidden": 0.25, "flip_ratio": 1e-3, "flip_ratio/a.b": 1.0, "epoch": 2.0}
    assert log_line(logs) == "loss 0.5  hidden 0.25  flips 0.001"
