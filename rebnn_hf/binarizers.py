"""The layers that turn inputs into few bits (the functions of `activations` with their parameters), and `calibrate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .activations import (
    ACTIVATION_SCALE_FLOOR,
    ActivationRule,
    clipped_sign,
    elastic_levels,
    elastic_sign,
    lsq_gradient,
    quadratic_sign,
    rprelu,
    token_int8,
)
from .functional import Ties
from .kernels import Codes
from .shards import is_sharded


def binarizer_of(rule: ActivationRule, features: int, signed: bool = True) -> nn.Module | None:
    """The layer that applies a rule to inputs [..., features]; None where they stay float.

    Args:
        rule: the rule.
        features: M, for the shift of each feature.
        signed: whether inputs can well be negative; decides between {-a, +a} and {0, a} of elastic activations.
    """
    if rule.kind == "elastic":
        return Elastic(rule.bits, signed, rule.signed_init if signed else rule.unsigned_init, features, rule.ties)
    if rule.kind == "rsign":
        return ShiftedSign(features, rule.ties)
    if rule.kind == "sign":
        return ClippedSign(rule.ties)
    return TokenInt8() if rule.kind == "token" else None


class ClippedSign(nn.Module):
    """`clipped_sign` as a layer without parameters: [..., M] -> codes [..., M] and no scale."""

    def __init__(self, ties: Ties = "up", open_window: bool = False):
        super().__init__()
        self.ties, self.open_window = ties, open_window

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Codes -1 or +1."""
        return clipped_sign(x, self.ties, self.open_window), None


class ShiftedSign(nn.Module):
    """ReActNet's RSign (D1): b = sign(x + shift), a learned shift for each feature that starts at 0.

    Shapes: `shift` [M]; input [..., M] -> codes [..., M] and no scale.
    """

    def __init__(self, features: int, ties: Ties = "up"):
        super().__init__()
        self.ties = ties
        self.shift = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start without shift."""
        self.shift.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Codes -1 or +1."""
        return quadratic_sign(x + self.shift, self.ties), None


class TokenInt8(nn.Module):
    """`token_int8` as a layer without parameters: [..., M] -> codes [..., M] and scales [..., 1]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes -127 to 127 and a scale for each token."""
        return token_int8(x)


class Elastic(nn.Module):
    """Elastic activation of BiT with a learned scale and, for linear layers, a learned shift of each feature (C1, C2).

    Codes: signed 1 bit {-1, +1}; signed k bits -2^(k-1) to 2^(k-1) - 1; unsigned 0 to 2^k - 1. The scale has the
    gradient of `lsq_gradient`, with N the number of inputs in the batch of a step, padding included, which comes in
    `batch_parts` equal parts (processes times accumulation steps; see `set_batch_parts`). The scale must be found from
    data first (`calibrate`, which `ReBNNTrainer` calls): until then it is 0, and the layer refuses to run.

    Args:
        bits: k.
        signed: whether codes can be negative.
        init: the scale starts at `init * mean|x| / sqrt(largest code)`.
        features: M, for the shift; None without shift (attention: the bias of the projection plays its part).
        ties: see `functional.sign` and `elastic_levels`.

    Shapes: `scale` [1], `shift` [M]; input [..., M] -> codes [..., M] and scale [1].
    """

    def __init__(self, bits: int, signed: bool, init: float, features: int | None = None, ties: Ties = "up"):
        super().__init__()
        self.bits, self.signed, self.init, self.ties = bits, signed, init, ties
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.batch_parts = 1
        self.scale = nn.Parameter(torch.empty(1))
        self.register_parameter("shift", None if features is None else nn.Parameter(torch.empty(features)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start without shift and with a scale that is still to be found."""
        self.scale.zero_()
        if self.shift is not None:
            self.shift.zero_()
        self.calibrated = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and the scale.

        Raises:
            RuntimeError: the scale was never found from data.
        """
        self.require_calibration()
        x = self._shifted(x)
        scale = lsq_gradient(self.positive_scale(), self.batch_parts * x.numel(), max(self.high, 1))
        if self.signed and self.bits == 1:
            return elastic_sign(x, scale, self.ties), scale
        return elastic_levels(x, scale, self.low, self.high, self.ties), scale

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the scale from inputs [..., M]: `init * mean|x| / sqrt(largest code)`."""
        mean = self._shifted(x).abs().float().mean()
        self.scale.fill_((self.init * mean / math.sqrt(max(self.high, 1))).clamp_min(ACTIVATION_SCALE_FLOOR).item())
        self.calibrated = True

    @torch.no_grad()
    def check_calibration(self) -> None:
        """Look once at a scale that was loaded, so that no forward pass has to."""
        self.calibrated = not self.scale.is_meta and bool((self.scale != 0).all())

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x + self.shift

    def require_calibration(self) -> None:
        """Refuse to run without a scale.

        Raises:
            RuntimeError: the scale was never found from data.
        """
        if not self.calibrated:
            raise RuntimeError(
                "an elastic activation has no scale yet: train with ReBNNTrainer, or call "
                "rebnn_hf.calibrate(model, batch) with a batch of real inputs before the first forward pass."
            )

    def positive_scale(self) -> Tensor:
        """The scale in force [1], positive whatever the optimizer does."""
        return self.scale.abs().clamp_min(ACTIVATION_SCALE_FLOOR)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.check_calibration()

    def extra_repr(self) -> str:
        """Width and sign, for print(model)."""
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}"


class RPReLU(nn.Module):
    """`rprelu` with learned parameters for each feature: shifts start at 0, the slope at 0.25 (ReActNet D2).

    Shapes: `shift_in`, `slope`, `shift_out` [M]; input and output [..., M].
    """

    def __init__(self, features: int):
        super().__init__()
        for name in ("shift_in", "slope", "shift_out"):
            self.register_parameter(name, nn.Parameter(torch.empty(features)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as a PReLU of slope 0.25."""
        self.shift_in.zero_()
        self.slope.fill_(0.25)
        self.shift_out.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] -> [..., M]."""
        return rprelu(x, self.shift_in, self.slope, self.shift_out)


PARAMETRIC = (ShiftedSign, Elastic, RPReLU)
"""The layers of this file that have parameters."""


def set_batch_parts(model: nn.Module, parts: int) -> None:
    """Tell elastic activations in how many equal parts the batch of an optimizer step reaches them.

    Raises:
        ValueError: not an integer >= 1.
    """
    if type(parts) is not int or parts < 1:
        raise ValueError(f"parts={parts!r} must be an integer >= 1: processes times gradient accumulation steps.")
    for module in model.modules():
        if isinstance(module, Elastic):
            module.batch_parts = parts


@torch.no_grad()
def calibrate(model: nn.Module, batch: Mapping[str, Any] | Tensor, parts: int = 1) -> int:
    """Find the scales of elastic activations that have none yet, from one batch, in a single forward pass.

    Deterministic: the model runs in eval mode, and each scale is set when its layer is reached, so that later layers
    see what the earlier ones make of the batch.

    Args:
        model: made by `binarize`.
        batch: inputs as for `model(**batch)`, or a tensor as for `model(batch)`, on the device of the model; every
            process must pass the same.
        parts: in how many equal parts the batch of an optimizer step will come, processes times accumulation steps: the
            gradients of the scales depend on the size of the whole. Not saved, so a loop that goes on from a checkpoint
            calls this again. `ReBNNTrainer` knows it.

    Returns:
        How many scales were set (0: there was nothing to find, and the model did not run).

    Raises:
        ValueError: layers that the forward pass did not reach, scales that are sharded already, or parts < 1.
    """
    waiting = {n: m for n, m in model.named_modules() if isinstance(m, Elastic) and not m.calibrated}
    if any(is_sharded(module.scale) for module in waiting.values()):
        raise ValueError("the scales are sharded over processes already; call calibrate() before fully_shard().")
    set_batch_parts(model, parts)
    if not waiting:
        return 0
    handles = [m.register_forward_pre_hook(lambda layer, inputs: layer.calibrate(inputs[0])) for m in waiting.values()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model(batch) if isinstance(batch, Tensor) else model(**batch)
    except BaseException:
        for module in waiting.values():  # a scale from half a forward pass would be kept for good
            module.scale.zero_()
            module.check_calibration()
        raise
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    missed = [name for name, module in waiting.items() if not module.calibrated]
    if missed:
        raise ValueError(
            f"{len(missed)} elastic activations were not reached by the batch (first: {missed[0]}); "
            "pass what the whole model needs to run."
        )
    return len(waiting)


def engine_codes(binarizer: nn.Module | None) -> Codes | None:
    """What the 1-bit engine has to know to compute a binarizer's codes; None if it cannot.

    Raises:
        RuntimeError: an elastic activation whose scale was never found from data.
    """
    if binarizer is None:
        return Codes()
    if getattr(binarizer, "ties", "up") != "up":
        return None
    if isinstance(binarizer, Elastic):
        binarizer.require_calibration()
        kind = "sign" if binarizer.signed and binarizer.bits == 1 else "levels"
        low = 0 if kind == "sign" else binarizer.low
        return Codes(kind, binarizer.bits, low, binarizer.positive_scale(), binarizer.shift)
    if isinstance(binarizer, ShiftedSign | ClippedSign):
        return Codes("sign", 1, shift=getattr(binarizer, "shift", None))
    return Codes("token", 8) if isinstance(binarizer, TokenInt8) else None


def fits_int8(binarizer: nn.Module | None) -> bool:
    """Whether a layer's inputs are integers from -128 to 127."""
    return binarizer is not None and getattr(binarizer, "high", 1) < 128


def codes_of(x: Tensor, binarizer: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes in the type of the product, and their scale; without a binarizer the input itself."""
    if binarizer is None:
        return x, None
    codes, scale = binarizer(x)
    return codes.to(dtype), scale


def channel_codes_of(x: Tensor, binarizer: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`codes_of` for images [..., C, H, W], whose features are the channels.

    Raises:
        ValueError: the binarizer gives each position a scale of its own, which cannot be taken out of a convolution.
    """
    if isinstance(binarizer, TokenInt8):
        raise ValueError(
            "activation='token' has a scale for each position, and a convolution sums over positions; use "
            "activation='elastic' with 8 bits."
        )
    codes, scale = codes_of(x.movedim(-3, -1) if binarizer is not None else x, binarizer, dtype)
    return codes.movedim(-1, -3) if binarizer is not None else codes, scale
