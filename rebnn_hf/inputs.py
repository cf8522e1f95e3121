"""What a model reads, tokens or images, how much of it, and random examples: for what runs a model only to watch it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SIDE = 224
"""Height and width of images where a model's config does not say it."""


def reads_images(model: PreTrainedModel) -> bool:
    """Whether a model reads `pixel_values`."""
    return model.main_input_name == "pixel_values"


def longest(model: PreTrainedModel) -> int:
    """Tokens that a model can read at once."""
    return getattr(model.config, "max_position_embeddings", 2**31)


def image_sides(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model was made for; 224 where no config, timm's included, says it."""
    config = getattr(model, "config", None)  # plain modules have none
    timm_size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", (3, SIDE, SIDE))
    return pair(getattr(config, "image_size", None) or tuple(timm_size[-2:]))


def pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, which a config gives as one number where they are equal."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def random_inputs(model: PreTrainedModel, batch: int, size: int | tuple[int, int]) -> dict[str, Tensor]:
    """Random tokens without padding, int64 [batch, tokens], or images, float32 [batch, channels, height, width].

    Args:
        model: that will read them.
        batch: how many.
        size: tokens in each; of images the side, or height and width.

    Raises:
        ValueError: the model reads neither text nor images, or not so much of it.
    """
    if reads_images(model):
        return {"pixel_values": _random_images(model, batch, *pair(size))}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}; only models that read text or images can run here."
        )
    if batch < 1 or not 1 <= size <= longest(model):
        raise ValueError(
            f"{batch} x {size} tokens do not fit: the batch must be at least 1, the length 1 to {longest(model)}."
        )
    ids = torch.randint(model.config.vocab_size, (batch, size))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _random_images(model: PreTrainedModel, batch: int, height: int, width: int) -> Tensor:
    if min(batch, height, width) < 1:
        raise ValueError(f"{batch} images of {height} x {width} do not fit: batch and side must be at least 1.")
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return torch.randn(batch, first.in_channels, height, width)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two short random texts, or two random images of the size that a model was made for: for tracing it."""
    return random_inputs(model, 2, image_sides(model) if reads_images(model) else min(16, longest(model)))
