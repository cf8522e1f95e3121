"""Where things are in a transformers model, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockLayout:
    """Names inside a block of the encoder, for what needs to know more than that there are linear layers.

    Attributes:
        attention: the module that calls transformers' attention interface.
        ffn_activation: the function between the linear layers of the feed-forward block.
        ffn_output: the linear layer that reads what that function gives.
        activation_field: what the model's config calls the function.
    """

    attention: str
    ffn_activation: str
    ffn_output: str
    activation_field: str


_BERT = BlockLayout("attention.self", "intermediate.intermediate_act_fn", "output.dense", "hidden_act")
_DISTILBERT = BlockLayout("attention", "ffn.activation", "ffn.lin2", "activation")

LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}
"""Layout of the blocks by `model_type`: 1-bit attention and other feed-forward functions work on these."""


def layout_of(model: PreTrainedModel) -> BlockLayout | None:
    """Layout of the model's blocks, None where it is not known."""
    return LAYOUTS.get(model.config.model_type)


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


def blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block of the encoder."""
    for prefix in block_prefixes(model):
        for index, block in enumerate(model.get_submodule(prefix.removesuffix("."))):
            yield f"{prefix}{index}", block
