"""1-bit and k-bit activations: what goes into a binary matrix product, as pure functions.

Every function returns integer *codes* (as floats) apart from their scale, `x_b = scale * codes`: the product of codes
with signs is an exact integer, and scales are applied to its result. Notation: x the input, b its codes,
delta_x = dL/dx, delta_b = dL/dx_b, 1[.] an indicator, M the features of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import Ties, check_fields, sign, through_window

ACTIVATION_SCALE_FLOOR = 1e-5
"""Smallest scale of an elastic activation (BiT C1)."""

INT8_PRODUCTS = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
"""Whether this CPU multiplies 8-bit integers faster than floats."""

BITS = {"none": (32,), "sign": (1,), "rsign": (1,), "elastic": (1, 2, 4, 8), "token": (8,)}
"""Widths that each kind of activation comes in; the first is its default."""


@dataclass(frozen=True)
class ActivationRule:
    """How the inputs of a binary layer become few bits.

    Args:
        kind: `none`, they stay float; `sign`, b = sign(x) with a clipped straight-through gradient (BiBERT B2);
            `rsign`, b = sign(x + shift) with the quadratic one (ReActNet D1); `elastic`, a learned scale and a shift
            for each feature (BiT C1, C2), in 1, 2, 4 or 8 bits; `token`, int8 with a scale found for each token.
        bits: of the codes; 32 for float.
        signed_init: an elastic scale of signed inputs starts at `signed_init * mean|x| / sqrt(largest code)`.
        unsigned_init: the same for inputs that are (nearly) never negative: attention probabilities, ReLU and GELU.
        ties: what becomes of a value exactly on a threshold, see `functional.sign`.

    Raises:
        ValueError: an unknown choice, or a width that the kind does not come in.
    """

    kind: Literal["none", "sign", "rsign", "elastic", "token"] = "none"
    bits: int = 32
    signed_init: float = 2.0
    unsigned_init: float = 4.0
    ties: Ties = "up"

    def __post_init__(self):
        check_fields(self)
        if self.bits not in BITS[self.kind]:
            raise ValueError(
                f"activation={self.kind!r} with activation_bits={self.bits!r} is not possible; "
                f"{self.kind!r} comes in {', '.join(map(str, BITS[self.kind]))} bits."
            )
        for name in ("signed_init", "unsigned_init"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a finite number > 0.")


# Functions


def clipped_sign(x: Tensor, ties: Ties = "up", open_window: bool = False) -> Tensor:
    """Sign with the clipped straight-through gradient (BiBERT B2): b = sign(x), delta_x = delta_b 1[|x| <= 1].

    Args:
        x: any shape.
        ties: sign(0), see `functional.sign`.
        open_window: 1[|x| < 1] instead, as BiBERT's code has it for queries, keys and values.

    Returns:
        -1 or +1, same shape.
    """
    return _SignThrough.apply(x, None, ties, "open" if open_window else "closed")


def quadratic_sign(x: Tensor, ties: Ties = "up") -> Tensor:
    """Sign with the gradient of Bi-Real's quadratic surrogate (ReActNet D1): delta_x = delta_b (2 - 2|x|) 1[|x| < 1].

    Args:
        x: any shape, after the shift.
        ties: sign(0), see `functional.sign`.

    Returns:
        -1 or +1, same shape.
    """
    return _SignThrough.apply(x, None, ties, "quadratic")


def elastic_sign(x: Tensor, scale: Tensor, ties: Ties = "up") -> Tensor:
    """Codes of the elastic signed activation {-a, +a} (BiT C1): b = sign(x), delta_x = delta_b 1[|x| <= a].

    The scale gets its gradient, sum(sign(x) delta_b), where it multiplies the codes.

    Args:
        x: any shape, after the shift.
        scale: a [1], > 0.
        ties: sign(0), see `functional.sign`.

    Returns:
        -1 or +1, same shape.
    """
    return _SignThrough.apply(x, scale.detach(), ties, "closed")


def elastic_levels(x: Tensor, scale: Tensor, low: int, high: int, ties: Ties = "up") -> Tensor:
    """Codes of the elastic activation with several levels (BiT C2, LSQ): b = clip(round(x / a), low, high); NaN: low.

    delta_x = delta_b 1[low <= x/a <= high]. Together with the factor a behind the codes the scale gets
    dx_b/da = round(x/a) - x/a inside the window, low below and high above it. {0, a} is low = 0, high = 1.

    Args:
        x: any shape, after the shift.
        scale: a [1], > 0.
        low: smallest code.
        high: largest code.
        ties: where x/a is half-way: `up`, the upper level; `released`, the even one.

    Returns:
        Integers from low to high, same shape.
    """
    # In half precision x/a + 1/2 would round up to the next integer from 128 on.
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
    return _LevelsThrough.apply(x, scale, low, high, ties).to(x.dtype)


def bool_gate(scores: Tensor, ties: Ties = "up") -> Tensor:
    """BiBERT's bool function of attention scores (B3): 1 where the score is not negative, else 0; slope 1 near 0.

    `ties="up"`: b = 1[A >= 0], delta_A = delta_b 1[|A| <= 1] (the paper); `released`: b = 1[A > 0] and 1[|A| < 1] (its
    code). With even head sizes ties are common: a tenth of the scores at d = 64.

    Args:
        scores: A, any shape.
        ties: see above.

    Returns:
        0 or 1, same shape.
    """
    return _BoolThrough.apply(scores, ties)


def token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic int8 for each token: s = max|x| / 127 over its features, b = round(x / s); straight-through gradient.

    Args:
        x: [..., M].

    Returns:
        Integers from -127 to 127 [..., M], and scales [..., 1] (constants for autograd).
    """
    scale = (x.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
    return _RoundThrough.apply(x / scale), scale


def lsq_gradient(scale: Tensor, elements: int, largest_code: int = 1) -> Tensor:
    """The scale itself, with the gradient of learned step sizes: delta_a / sqrt(N * largest code) (LSQ; BiT C1).

    Args:
        scale: a [1].
        elements: N, number of inputs that share the scale.
        largest_code: largest level, 1 for 1-bit activations.
    """
    if not scale.requires_grad:  # a root of N would fix the size of the batch in an exported program
        return scale
    return _GradientFactor.apply(scale, 1 / math.sqrt(max(elements, 1) * largest_code))


def rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor, images: bool = False) -> Tensor:
    """Shifted PReLU of ReActNet (D2): y = z for z > 0, slope * z otherwise, plus shift_out, where z = x + shift_in.

    (D2 writes the inner shift as beta1 that is added.)

    Args:
        x: [..., M], or images [N, M, H, W].
        shift_in: [M].
        slope: [M].
        shift_out: [M].
        images: whether M is the second dimension.

    Returns:
        As x.
    """
    if images:
        return F.prelu(x + shift_in.view(-1, 1, 1), slope) + shift_out.view(-1, 1, 1)
    z = x + shift_in
    # prelu takes the second dimension for the features; torch.where in its place is 8 to 40 times slower on a CPU.
    return F.prelu(z.reshape(-1, z.shape[-1]), slope).view(z.shape) + shift_out


def integer_product(codes: Tensor, signs: Tensor) -> Tensor:
    """Product of codes with signs, `codes b^T`, where it is faster in 8-bit integers: the same result, bit for bit.

    Floats that are integers multiply and add without rounding up to 2^24, so the forward pass may as well use integer
    instructions, which take a third of the time. Gradients are not integers: the backward pass is that of `F.linear`.

    Args:
        codes: integers from -128 to 127 [..., M].
        signs: b [O, M], same dtype, which is the type of the result.

    Returns:
        [..., O].
    """
    # torch's product of matrices with one column is wrong (2.13: the transposed one is taken for the other).
    if INT8_PRODUCTS and codes.device.type == "cpu" and codes.numel() and codes.shape[-1] > 1:
        return _Int8Product.apply(codes, signs)
    return F.linear(codes, signs)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, signs):
        ctx.save_for_backward(codes, signs)
        product = torch._int_mm(codes.to(torch.int8).reshape(-1, codes.shape[-1]), signs.to(torch.int8).t())
        return product.to(codes.dtype).view(*codes.shape[:-1], len(signs))

    @staticmethod
    def backward(ctx, grad):
        codes, signs = ctx.saved_tensors
        grad_codes = grad @ signs if ctx.needs_input_grad[0] else None
        rows, inputs = grad.reshape(-1, len(signs)), codes.reshape(-1, codes.shape[-1])
        return grad_codes, rows.t() @ inputs if ctx.needs_input_grad[1] else None


class _SignThrough(torch.autograd.Function):
    """Sign with a window; with a scale, the codes of {-a, +a}: delta_x = (delta_codes / a) 1[|x| <= a]."""

    @staticmethod
    def forward(ctx, x, scale, ties, window):
        # In units of a, so that the bounds are constants. Division rounds to the nearest float, and therefore
        # |x / a| <= 1 exactly where |x| <= a.
        ctx.save_for_backward(x if scale is None else x / scale, scale)
        ctx.window = window
        return sign(x, ties)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if ctx.window == "quadratic":
            passed = torch.rsub(x.abs(), 2, alpha=2).clamp_min_(0).mul_(grad)
        elif ctx.window == "open":
            passed = torch.ops.aten.hardtanh_backward(grad, x, -1, 1)
        else:
            passed = through_window(grad, x, -1, 1)
        return passed if scale is None else passed.div_(scale), None, None, None


class _LevelsThrough(torch.autograd.Function):
    """clip(round(x / a)): straight through inside, and for the scale -x/a inside (the factor a adds the codes)."""

    @staticmethod
    def forward(ctx, x, scale, low, high, ties):
        ratio = x / scale
        ctx.save_for_backward(ratio, scale)
        ctx.low, ctx.high = low, high
        rounded = torch.round(ratio) if ties == "released" else (ratio + 0.5).floor_()
        return rounded.nan_to_num_(nan=low).clamp_(low, high)  # a NaN is below every threshold, as in the engine

    @staticmethod
    def backward(ctx, grad):
        ratio, scale = ctx.saved_tensors
        grad_x = through_window(grad, ratio, ctx.low, ctx.high).div_(scale)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = -torch.dot(ratio.flatten(), grad_x.flatten()).reshape(scale.shape).to(scale.dtype)
        return grad_x, grad_scale, None, None, None


class _BoolThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, ties):
        ctx.save_for_backward(scores)
        ctx.ties = ties
        compare = torch.ge if ties == "up" else torch.gt
        if torch.compiler.is_compiling():
            return compare(scores, 0).to(scores.dtype)
        return compare(scores, 0, out=torch.empty_like(scores))

    @staticmethod
    def backward(ctx, grad):
        (scores,) = ctx.saved_tensors
        if ctx.ties == "up":
            return through_window(grad, scores, -1, 1), None
        return torch.ops.aten.hardtanh_backward(grad, scores, -1, 1), None


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _GradientFactor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
