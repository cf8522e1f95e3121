"""Loading state dicts: our own, those of the authors' codes, and those of stage one of two-stage training.

Nothing is left out in silence: that is how the authors' MobileNet lost all binary weights between its stages (D8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..layers import BinaryConv2d
from .backbone import BinaryBackbone

RELEASED_SCALE = 0.02
"""The released ReBNN code multiplies its learned scale by this constant (A6)."""


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BinaryBackbone) -> dict[str, Tensor]:
    """A checkpoint in the names and shapes of a model; timm calls it for `pretrained=True`.

    Understands our own names and those of the released ReActNet and ReBNN codes, alone or under `state_dict`, with or
    without `module.`. The classifier may be missing or left over: timm sees to it.

    Args:
        state_dict: the checkpoint.
        model: of which family the checkpoint is.

    Returns:
        A state dict of the model.

    Raises:
        ValueError: keys that the model has and the checkpoint has not, or the other way round.
    """
    state, released = _in_our_names(state_dict, model)
    if released:  # which keep no balance: every first step begins with none
        balances = {key: value for key, value in model.state_dict().items() if key.endswith(".balance")}
        state = {**{key: torch.zeros_like(value, device="cpu") for key, value in balances.items()}, **state}
    classifier = {"head.fc.weight", "head.fc.bias"}
    require_keys(state.keys() - classifier, model.state_dict().keys() - classifier)
    return state


def load_stage_one(model: BinaryBackbone, state_dict: Mapping[str, Any]) -> None:
    """Begin stage two (1-bit weights) with the weights of stage one (`binary_weights=False`), see D7.

    All parameters are taken over, and each learned scale starts anew from the weights, `alpha_i = mean_j |W_ij|` (A6).

    Args:
        model: with 1-bit weights; unchanged if the state dict does not fit.
        state_dict: of the same model with float weights; the released codes' names are understood too.

    Raises:
        ValueError: a model without 1-bit weights, missing or unexpected keys, or other shapes.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, BinaryConv2d)}
    if not convs:
        raise ValueError("the model has no 1-bit weights; create it with binary_weights=True to load stage one into.")
    state, _ = _in_our_names(state_dict, model)
    own = model.state_dict()
    fresh = {f"{name}.{made}" for name in convs for made in ("weight_scale", "balance")} & own.keys()
    require_keys(state.keys(), own.keys() - fresh)
    if wrong := [key for key, value in state.items() if value.shape != own[key].shape]:
        sizes = f"{tuple(state[wrong[0]].shape)} in place of {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"{len(wrong)} tensors of the state dict have other shapes (first: {wrong[0]}, {sizes}).")
    model.load_state_dict({**own, **state})
    for conv in convs.values():
        conv.reset_scale()


def _in_our_names(checkpoint: Mapping[str, Any], model: BinaryBackbone) -> tuple[dict[str, Tensor], bool]:
    """The tensors under our names, and whether they had those of the released codes."""
    state = {key.removeprefix("module."): value for key, value in checkpoint.get("state_dict", checkpoint).items()}
    if any(key.startswith("stem.") for key in state):
        return state, False
    own = model.state_dict()
    parts: dict[str, list[Tensor]] = {}
    for key, value in sorted(state.items()):  # the halves of a doubling convolution in their order
        name = key
        for pattern, replacement in model.released_names:
            name = re.sub(pattern, replacement, name)
        parts.setdefault(name, []).append(RELEASED_SCALE * value.abs() if name.endswith(".weight_scale") else value)
    renamed = {name: values[0] if values[0].ndim == 0 else torch.cat(values) for name, values in parts.items()}
    return {name: _in_shape_of(own.get(name), value) for name, value in renamed.items()}, True


def _in_shape_of(own: Tensor | None, value: Tensor) -> Tensor:
    """A vector or flat weights [n, 1] or [1, n, 1, 1] in our shape; anything else as it is, for loading to judge."""
    flat = value.numel() == max(value.shape, default=1)
    return value.reshape(own.shape) if own is not None and flat and own.numel() == value.numel() else value


def require_keys(keys: Set[str], expected: Set[str]) -> None:
    """Raise a ValueError that says what a checkpoint has too few or too many of."""
    missing, unexpected = sorted(expected - keys), sorted(keys - expected)
    if not missing and not unexpected:
        return
    hint = ""
    if not unexpected and all(key.endswith((".weight_scale", ".balance")) for key in missing):
        hint = " These come with 1-bit weights: load a checkpoint of stage one with rebnn_hf.vision.load_stage_one()."
    raise ValueError(
        f"the checkpoint does not fit the model: {len(missing)} keys are missing ({_some(missing)}), "
        f"{len(unexpected)} are unexpected ({_some(unexpected)}).{hint}"
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "") if keys else "none"
