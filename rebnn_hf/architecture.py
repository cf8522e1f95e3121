"""Where things are in a transformers model, whatever the architecture calls them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def base_relative(model: PreTrainedModel, name: str) -> str | None:
    """Name of a module relative to the base model, None for a module outside of it."""
    if model.base_model is model:
        return name
    prefix = model.base_model_prefix + "."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def block_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the lists of equal blocks in the base model: the encoder, whatever the architecture calls it."""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and base_relative(model, name) is not None
        and len({type(block) for block in module}) == 1
    )
