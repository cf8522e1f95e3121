"""The equations of ReBNN (arXiv 2302.00956) and of the baselines it is compared with, as pure functions.

Notation: latent weights W [O, M], one row per output channel (an embedding: one row per token); signs
b = sign(W) in {-1, +1}; one scale alpha_i per row (or one for the tensor); binary weights
W_hat_ij = alpha_i b_ij; task gradient G = dL/dW_hat, L without the reconstruction term.
"""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

SCALE_FLOOR = 1e-8
"""Smallest initial scale: an all-zero row (a padding embedding) still gets a positive one."""


Ties = Literal["up", "released"]
"""What becomes of a value exactly on a threshold, see `sign`."""


def check_fields(rule) -> None:
    """Raise a ValueError where a field of a dataclass holds what its annotation does not allow.

    Looks at words (Literal), booleans, numbers, strings, and None beside them; 1 and 1.0 are not true, nor true 1.
    """
    for name, hint in _hints(type(rule)).items():
        value = getattr(rule, name)
        if _fits(value, hint):
            continue
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices:
            raise ValueError(f"{name}={shown(value)} is unknown; expected one of {', '.join(map(repr, choices))}.")
        raise ValueError(f"{name}={shown(value)} must be {_in_words(hint)}.")


def shown(value: Any) -> str:
    """`repr` for messages: what comes from a file may be long or deep."""
    return _Short.repr(value)


_Short = reprlib.Repr()
_Short.maxstring = _Short.maxother = 120
_Short.maxlevel = 3


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:  # an integer of a thousand digits is none
        return isinstance(value, float) or (_fits(value, int) and abs(value) <= sys.float_info.max)
    if hint is NoneType:
        return value is None
    return not isinstance(hint, type) or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "True or False", NoneType: "None"}
    return " or ".join(words.get(part, str(part)) for part in (get_args(hint) or (hint,)))


@dataclass(frozen=True)
class WeightRule:
    """How latent weights become binary ones, and how gradients find their way back.

    Forward: `W_hat = alpha * sign(W - mu)`. Backward: `dW = P[slope * G * window]`, where P is the Jacobian of
    the centering (identity without one).

    Args:
        scale: `learned`, alpha is a parameter (ReBNN, section A1); `mean_abs`, alpha = mean |W| in closed form (BWN).
        granularity: one alpha per `row` or one per `tensor`.
        scale_gradient: how a closed-form alpha is differentiated: `none`, treated as a constant (ReActNet, BiBERT);
            `exact`, the chain rule through mean |W|; `xnor`, the published XNOR-Net gradient
            `G * (1/M + alpha * window)`.
        center: mu = 0 (`none`), the mean of the `row` (BiBERT) or of the `tensor` (BiT).
        center_gradient: whether P is kept (`dW - mean(dW)`, BiBERT) or replaced by the identity (BiT).
        ste: the window: `clip`, 1 where |W - mu| <= 1 and else 0; `identity`, 1 everywhere.
        slope: `scale`, the chain rule's alpha; `unit`, 1 (ReActNet, BiBERT, BiT).
        ties: sign(0), see `sign`.

    Raises:
        ValueError: an unknown choice, or a scale gradient for a scale that is learned.
    """

    scale: Literal["learned", "mean_abs"] = "learned"
    granularity: Literal["row", "tensor"] = "row"
    scale_gradient: Literal["none", "exact", "xnor"] = "none"
    center: Literal["none", "row", "tensor"] = "none"
    center_gradient: bool = True
    ste: Literal["clip", "identity"] = "clip"
    slope: Literal["scale", "unit"] = "scale"
    ties: Ties = "up"

    def __post_init__(self):
        check_fields(self)
        if self.scale == "learned" and self.scale_gradient != "none":
            raise ValueError(
                f"scale_gradient={self.scale_gradient!r} differentiates a closed-form scale, but scale='learned' is "
                "a parameter with a gradient of its own; use scale='mean_abs' or scale_gradient='none'."
            )


@dataclass(frozen=True)
class BalanceRule:
    """How strongly a row is held to its binary value: the balance gamma of the weighted reconstruction loss.

    With f_i the share of row i whose sign changed in a step, and m_i = max_j |G_ij| of that step:

    - `flip_maxgrad`: gamma_i = f_i * m_i, used in the next step (the paper's rule, section A3);
    - `maxgrad`: gamma_i = m_i, used in the same step (ablation: under SGD no weight can flip);
    - `const`: gamma_i = value (what the authors' released code really does, with 2e-4);
    - `none`: gamma_i = 0 (learned scales alone).

    Args:
        rule: one of the above.
        value: gamma of `const`.
        lower, upper: bounds for gamma, off by default. They are absolute: unlike the unbounded rule they are not
            covariant with the scale of the loss.
        form: `gradient`, gamma * (W - alpha b) is added to the gradient (the paper); `decoupled`, the weight itself
            is moved after the optimizer step (see `decoupled_share`), untouched by the optimizer's moments.
        strength: factor of the decoupled pull.

    Raises:
        ValueError: an unknown choice, a bound that cannot hold, or bounds of `none`.
    """

    rule: Literal["flip_maxgrad", "maxgrad", "const", "none"] = "flip_maxgrad"
    value: float = 2e-4
    lower: float | None = None
    upper: float | None = None
    form: Literal["gradient", "decoupled"] = "gradient"
    strength: float = 1.0

    def __post_init__(self):
        check_fields(self)
        for name in ("value", "lower", "upper", "strength"):
            number = getattr(self, name)
            if number is not None and not 0 <= number < float("inf"):
                raise ValueError(f"{name}={number!r} must be a finite number >= 0.")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(f"lower={self.lower} is above upper={self.upper}; swap them or leave one out.")
        if self.rule == "none" and (self.lower, self.upper) != (None, None):
            raise ValueError(
                f"rule='none' has a balance of 0, and no bounds (lower={self.lower}, upper={self.upper}); leave them "
                "out, or use rule='const' with a value."
            )
        if self.form == "decoupled" and self.rule == "maxgrad":
            raise ValueError(
                "rule='maxgrad' has no decoupled form: normalised by the largest gradient it is 1 for every row, "
                "which would set each weight to its binary value; use 'flip_maxgrad' or 'const'."
            )


def sign(x: Tensor, ties: Ties = "up") -> Tensor:
    """Sign with sign(0) = +1, the one sign of this package: what is binary has two values, never three.

    Args:
        x: any shape, floating point.
        ties: `released` is torch's sign, with sign(0) = 0, which the released codes of BiBERT, BiT and ReBNN use: for
            comparisons with them in training only, since three values do not fit into a bit.

    Returns:
        -1 or +1, same shape and dtype.
    """
    if ties == "released":
        return torch.sign(x.detach())
    return torch.threshold_(_zero_or_one(x), 0.5, -1.0)  # 0 -> -1 in one pass


def is_positive(x: Tensor) -> Tensor:
    """Where `sign(x)` is +1: boolean, same shape."""
    return _zero_or_one(x).to(torch.bool)


def _zero_or_one(x: Tensor) -> Tensor:
    # A comparison that writes floats is vectorised: faster than one that writes booleans, and six times faster than
    # torch.where between two constants.
    if torch.compiler.is_compiling():  # which knows no out= that is strided, and joins the two by itself
        return (x.detach() >= 0).to(x.dtype)
    return torch.ge(x.detach(), 0, out=torch.empty_like(x))


def through_window(grad: Tensor, x: Tensor, low: int, high: int) -> Tensor:
    """Gradient of a straight-through window: grad * 1[low <= x <= high].

    One vectorised pass, the derivative of hardtanh, where a mask of booleans takes ten times as long on a CPU. That
    derivative is open at its bounds, so they are moved outward by one float.

    Args:
        grad: any shape.
        x: same shape.
        low: <= 0.
        high: > 0.

    Returns:
        New tensor of the same shape, in the wider type of the two.
    """
    return torch.ops.aten.hardtanh_backward(grad, x, -_next_float(-low, x.dtype), _next_float(high, x.dtype))


def _next_float(bound: int, dtype: torch.dtype) -> float:
    """Smallest float above a bound >= 0; above 0 the smallest normal one."""
    info = torch.finfo(dtype)
    return bound + info.eps * 2.0 ** (bound.bit_length() - 1) if bound else info.tiny


class _StraightThroughSign(torch.autograd.Function):
    """Sign with the surrogate gradient `G_b * (window * slope + leak)`."""

    @staticmethod
    def forward(ctx, weight, rule, slope, leak, dtype):
        ctx.save_for_backward(weight, slope, leak)
        ctx.window = rule.ste == "clip"
        return sign(weight, rule.ties).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, slope, leak = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        passed = through_window(grad, weight, -1, 1) if ctx.window else grad
        if slope is not None:
            passed = passed * slope
        if leak is not None:
            passed = passed + grad * leak
        return passed, None, None, None, None


def center(weight: Tensor, rule: WeightRule, table: Tensor | None = None) -> Tensor:
    """Latent weights minus their mean: `W - mu`, mu by `rule.center` (BiBERT B1 per row, BiT C4 per tensor).

    Args:
        weight: rows, [..., M].
        rule: `center` and `center_gradient` are used.
        table: the whole tensor where `weight` holds only some of its rows (an embedding look-up).

    Returns:
        Centered rows, same shape.
    """
    mean = latent_mean(weight, rule, table)
    return weight if mean is None else weight - mean


def latent_mean(weight: Tensor, rule: WeightRule, table: Tensor | None = None) -> Tensor | None:
    """What `center` subtracts: mu [..., 1] per row, or [] of the tensor; None where nothing is."""
    if rule.center == "none":
        return None
    mean = weight.mean(-1, keepdim=True) if rule.center == "row" else (weight if table is None else table).mean()
    return mean if rule.center_gradient else mean.detach()


def mean_abs_scale(weight: Tensor, granularity: str = "row") -> Tensor:
    """Closed-form scale `alpha_i = ||w_i||_1 / M`, the minimiser of ||w_i - alpha_i b_i||^2 (BWN, XNOR-Net).

    Args:
        weight: [..., M], not centered.
        granularity: `row` or `tensor`.

    Returns:
        [...] for rows, [1] for the tensor.
    """
    return weight.abs().mean(-1) if granularity == "row" else weight.abs().mean().reshape(1)


def binarize_rows(
    weight: Tensor,
    learned_scale: Tensor | None,
    rule: WeightRule,
    table: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Split binary weights into signs and scales: `W_hat = alpha * b` (ReBNN A1).

    Kept apart because `x W_hat^T = alpha * (x b^T)`: the product with signs is exact in any precision, and autograd
    yields the gradients of A2, `dW = alpha G 1[|W|<=1]` and `dalpha_i = sum_j G_ij b_ij`, without a float copy of
    W_hat.

    Args:
        weight: latent rows [..., M].
        learned_scale: [...] or [1], required where `rule.scale` is `learned`. Its absolute value is used, so that
            scales stay positive whatever the optimizer does.
        rule: see `WeightRule`.
        table: the whole tensor where `weight` holds only some rows (an embedding look-up).
        dtype: of the signs; default that of the weight.

    Returns:
        Signs [..., M] and scales [...] (or [1]).

    Raises:
        ValueError: a learned scale is missing.
    """
    if rule.scale == "learned":
        if learned_scale is None:
            raise ValueError("rule.scale='learned' needs learned_scale, got None; pass the layer's weight_scale.")
        scale = learned_scale.abs()
    else:
        statistics = weight if table is None or rule.granularity == "row" else table
        scale = mean_abs_scale(statistics, rule.granularity)
        if rule.scale_gradient != "exact":
            scale = scale.detach()
    slope = leak = None
    if rule.slope == "unit":
        slope = scale.detach().clamp_min(SCALE_FLOOR).reciprocal().unsqueeze(-1)
    if rule.scale_gradient == "xnor":
        leak = (scale.detach().clamp_min(SCALE_FLOOR) * weight.shape[-1]).reciprocal().unsqueeze(-1)
    centered = center(weight, rule, table)
    signs = _StraightThroughSign.apply(centered, rule, slope, leak, dtype or weight.dtype)
    return signs, scale


def largest_gradient(magnitude: Tensor, scale: Tensor, rule: WeightRule) -> Tensor:
    """Largest task gradient of a row, `m_i = max_j |G_ij|` (A3), recovered from the latent gradient.

    `dW = alpha G` wherever the straight-through window is open, so m_i = max_j |dW_ij| / alpha_i (A4): no copy of G
    is kept, and the gradient of the whole accumulated, all-reduced batch is seen. Entries with |W| > 1 are outside
    the window and do not count; with a centering Jacobian the maximum is that of `P[G]`.

    Args:
        magnitude: max_j |dW_ij| [O], before the reconstruction term is added.
        scale: [O] or [1], > 0.
        rule: its slope tells whether dW carries alpha.

    Returns:
        [O].
    """
    return magnitude / scale.clamp_min(SCALE_FLOOR) if rule.slope == "scale" else magnitude


def balance(flip_share: Tensor, largest_grad: Tensor, rule: BalanceRule) -> Tensor:
    """Balance of each row: `gamma_i^{t+1} = f_i^{t->t+1} * max_j |G_ij^t|` (A3) or one of its ablations.

    Args:
        flip_share: f [O], share of each row whose sign changed, in [0, 1].
        largest_grad: m [O].
        rule: see `BalanceRule`.

    Returns:
        gamma [O], within the rule's bounds.
    """
    gamma = {
        "flip_maxgrad": lambda: flip_share * largest_grad,
        "maxgrad": lambda: largest_grad.clone(),
        "const": lambda: torch.full_like(largest_grad, rule.value),
        "none": lambda: torch.zeros_like(largest_grad),
    }[rule.rule]()
    return gamma if rule.lower is None and rule.upper is None else gamma.clamp(rule.lower, rule.upper)


def decoupled_share(flip_share: Tensor, rule: BalanceRule) -> Tensor:
    """Normalised balance of the decoupled form, `rho_i = gamma_i / max_j |G_ij|`: f_i, or the constant.

    The pull is `W <- W - strength * (eta_t / eta_0) * rho_i * (W - alpha b)` after the optimizer's own step, with the
    signs after that step: in the spirit of AdamW's weight decay it bypasses the moments, which would otherwise divide
    it by the running gradient scale. It follows the schedule of the learning rate, not its size: multiplied by
    eta ~ 1e-3 as well, a pull with f ~ 1e-3 would be 1e-6 of the distance, that is nothing.

    Args:
        flip_share: f [O].
        rule: see `BalanceRule`; its bounds apply to rho.

    Returns:
        rho [O].
    """
    return balance(flip_share, torch.ones_like(flip_share), rule)


def reconstruction_loss(weight: Tensor, signs: Tensor, scale: Tensor, gamma: Tensor) -> Tensor:
    """Weighted reconstruction loss of one layer, `L_R = 1/2 sum_i gamma_i ||w_i - alpha_i b_i||^2` (A1).

    Args:
        weight: W (centered if the rule centers) [O, M].
        signs: b [O, M], a constant for autograd.
        scale: alpha [O] or [1].
        gamma: [O], a constant for autograd.

    Returns:
        Scalar.
    """
    residual = weight - scale.unsqueeze(-1) * signs.detach()
    return 0.5 * (gamma.detach() * residual.square().sum(-1)).sum()


@torch.no_grad()
def reconstruction_gradients(weight: Tensor, signs: Tensor, scale: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `reconstruction_loss` (A2): `gamma_i (w_i - alpha_i b_i)` and `-gamma_i (||w_i||_1 - M alpha_i)`.

    Args:
        weight: W (centered if the rule centers) [O, M].
        signs: b [O, M].
        scale: alpha [O] or [1].
        gamma: [O].

    Returns:
        dL_R/dW [O, M] and dL_R/dalpha, shaped like `scale`.
    """
    column = scale.unsqueeze(-1)
    residual = torch.addcmul(weight, signs, -column)
    norm = weight.abs().sum(-1)  # two to three times faster than vector_norm
    return residual.mul_(gamma.unsqueeze(-1)), scale_gradient(norm, weight.shape[-1], scale, gamma)


def scale_gradient(norm: Tensor, width: int, scale: Tensor, gamma: Tensor) -> Tensor:
    """The second of `reconstruction_gradients`, from the norms ||w_i||_1 [O] of rows of M = `width` weights."""
    by_scale = -gamma * (norm - width * scale)
    return by_scale if scale.numel() == len(gamma) else by_scale.sum(0, True)
