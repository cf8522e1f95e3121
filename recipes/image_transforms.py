"""How images become tensors: timm's own transforms, and random ones that an interruption does not change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL.Image import Image
from timm.data import create_transform
from torchvision.transforms import Compose, RandomAffine

CROPS = (0.08, 1.0)  # share of the area, as in ReActNet and ReBNN
SHIFT = 1 / 8  # of the side of a digit: one of its pixels


def evaluation_transform(config: dict[str, Any]) -> Callable[[Image], torch.Tensor]:
    """Image -> tensor [3, H, W], as transformers' image processor does it from the saved config."""
    return create_transform(**config, is_training=False)


def training_transform(config: dict[str, Any], digits: bool) -> Callable[[Image], torch.Tensor]:
    """Image -> tensor [3, H, W] after random crops and mirroring; digits are only shifted."""
    if digits:
        return Compose([RandomAffine(0, translate=(SHIFT, SHIFT)), evaluation_transform(config)])
    return create_transform(**config, is_training=True, scale=CROPS, color_jitter=None)


class EvaluationImages(torch.utils.data.Dataset):
    """`pixel_values` of the images of a split in their order."""

    def __init__(self, split: Dataset, transform: Callable[[Image], torch.Tensor]):
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels(self.split[index])}

    def pixels(self, row: dict[str, Any]) -> torch.Tensor:
        """The transformed image, in colour as pipelines load it."""
        return self.transform(row["image"].convert("RGB"))


class TrainingImages(EvaluationImages):
    """`pixel_values` and `labels`, whose random transform is a function of seed, epoch and index alone.

    Args:
        split: Images and labels.
        transform: Draws from the generators of python, numpy and torch.
        seed: Of the run.
    """

    def __init__(self, split: Dataset, transform: Callable[[Image], torch.Tensor], seed: int):
        super().__init__(split, transform)
        self.seed = seed

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, Any]:
        epoch, index = epoch_and_index
        row = self.split[index]
        with seeded(self.seed, epoch, index):
            return {"pixel_values": self.pixels(row), "labels": row["label"]}


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Starts the generators of python, numpy and torch (CPU) anew, and puts them back in the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
