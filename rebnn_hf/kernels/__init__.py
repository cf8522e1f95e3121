"""The 1-bit engine: torch operators, the choice of backend, and which one computes what.

Backends: `reference`, torch in floats, on every device; `cpu`, the C library of `csrc` (see `docs/engine.md`); `auto`,
`cpu` where it can be used, else `reference`. Chosen by the environment variable `REBNN_BACKEND`, or by `set_backend`.
Both give the same integers; floats may differ by rounding.

Operators (`torch.ops.rebnn`), with fakes, so that `torch.compile` and `torch.export` trace them:

- `linear(x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift)`: codes of x times signs.
- `conv2d(x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift, kernel, stride, padding,
  residual)`: the same of the windows of an image; shortcut and RPReLU may follow.
- `embedding(indices, bits, weight_scale, width)`: rows of a 1-bit table.
- `attention(query, key, value, mask, table, threshold, scale)`: of 1-bit queries, keys, values and probabilities.
- `encoder(hidden, mask, image)`: a stack of fully binary BERT layers, see `fusion`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu

__all__ = ["backend", "set_backend", "use_backend"]  # what users call; the rest is for the layers of this package

BACKENDS = ("auto", "reference", "cpu")
ENVIRONMENT = "REBNN_BACKEND"

_library = torch.library.Library("rebnn", "DEF")
_library.define(
    "linear(Tensor x, Tensor bits, Tensor? layout, Tensor weight_scale, Tensor? bias, str codes, int width, int low, "
    "Tensor? input_scale, Tensor? shift) -> Tensor"
)
_library.define(
    "conv2d(Tensor x, Tensor bits, Tensor? layout, Tensor weight_scale, Tensor? bias, str codes, int width, int low, "
    "Tensor? input_scale, Tensor? shift, int[] kernel, int[] stride, int[] padding, Tensor[]? residual=None) -> Tensor"
)
_library.define("embedding(Tensor indices, Tensor bits, Tensor weight_scale, int width) -> Tensor")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? table, Tensor threshold, Tensor scale) "
    "-> Tensor"
)
_library.define("encoder(Tensor hidden, Tensor? mask, Tensor image) -> Tensor")


@dataclass(frozen=True)
class Codes:
    """How the inputs of a layer become integers, as the engine knows it (`rebnn.h`).

    Args:
        kind: `float`, they do not; `sign`, -1 and +1 of x + shift; `levels`, clip(floor((x + shift) / scale + 1/2)) to
            2^width integers from `low` on; `token`, int8 with a scale found for each token.
        width: bits of a code.
        low: the lowest of `levels`.
        scale: a [1], multiplies the result; None for 1.
        shift: [M], of a convolution [C]; or None.
    """

    kind: str = "float"
    width: int = 32
    low: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def layout(self) -> int:
        """Number of the kernel layout that products with these codes read; see `rebnn_layout` in rebnn.h."""
        return cpu.QUADS if self.width == 8 else cpu.WORDS


class Residual(NamedTuple):
    """What makes a unit of a residual network of a convolution: shortcut and RPReLU (`rebnn_residual`).

    Args:
        shortcut: of the shape of the result, [N, O, H', W'].
        shift_in, slope, shift_out: [O].
    """

    shortcut: Tensor
    shift_in: Tensor
    slope: Tensor
    shift_out: Tensor


# Which backend


_chosen: str | None = None


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend; expected one of {', '.join(BACKENDS)}.")
    if name == "cpu" and not cpu.available():
        raise RuntimeError(f"{source}='cpu' asks for the C library, which is not there: {cpu.why_not()}")
    return name


def backend() -> str:
    """The backend in force, `reference` or `cpu`; `cpu` serves tensors on the CPU only.

    Raises:
        ValueError: `REBNN_BACKEND` is none of `BACKENDS`.
        RuntimeError: `cpu` was asked for and is not available.
    """
    name = _chosen or _check(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
    if name == "auto":
        return "cpu" if cpu.available() else "reference"
    return name


def backend_and_why() -> str:
    """The backend in force, in words: with which instruction set, or why not `cpu`."""
    name = backend()
    if name == "cpu":
        return f"cpu, with {cpu.isa_name()}"
    if _chosen is not None:
        return f"{name}, which set_backend() chose"
    asked = os.environ.get(ENVIRONMENT) == name
    return f"{name}, because {f'{ENVIRONMENT}={name}' if asked else cpu.why_not()}"


def set_backend(name: str | None) -> None:
    """Choose the backend for this process; None: what `REBNN_BACKEND` says, or `auto`.

    Raises:
        ValueError: not one of `BACKENDS`.
        RuntimeError: `cpu` is not available.
    """
    global _chosen
    _chosen = None if name is None else _check(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the time of a `with` block."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def serves(x: Tensor) -> bool:
    """Whether the C library computes with this input: on the CPU, in at most 32 bits, and without autocast."""
    on_cpu = x.device.type == "cpu" and x.dtype != torch.float64 and not torch.is_autocast_enabled("cpu")
    return on_cpu and backend() == "cpu"


# Operators


def linear(
    x: Tensor, bits: Tensor, layout: Tensor | None, weight_scale: Tensor, bias: Tensor | None, codes: Codes
) -> Tensor:
    """`(c b^T) * (weight_scale * input scale) + bias` by the C library, for inputs that `serves` accepts.

    Args:
        x: [..., M], floating point.
        bits: b in the bit format, uint8 [O, ceil(M / 8)].
        layout: b as `cpu.layout(bits, M, codes.layout)` gives it; None: made for this call (unused by `float`).
        weight_scale: [O].
        bias: [O] or None.
        codes: how x becomes c.

    Returns:
        [..., O] in the type of x; computed in float32, and for `float` in blocks of rows, so that no float copy of
        all weights ever exists.
    """
    return torch.ops.rebnn.linear(
        x, bits, layout, weight_scale, bias, codes.kind, codes.width, codes.low, codes.scale, codes.shift
    )


def conv2d(
    x: Tensor,
    bits: Tensor,
    layout: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    codes: Codes,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Residual | None = None,
) -> Tensor:
    """`conv2d(c, b) * (weight_scale * input scale) + bias` by the C library, for inputs that `serves` accepts.

    The padding is zeros of c, whatever x = 0 would become: a padded position adds nothing to a product. One group,
    dilation 1.

    Args:
        x: [N, C, H, W], floating point.
        bits: b in the bit format, uint8 [O, ceil(C * kh * kw / 8)], elements of a row in the order [C][kh][kw].
        layout: b as `cpu.conv_layout(bits, C, kernel, codes.layout)` gives it; None: made for this call.
        weight_scale: [O].
        bias: [O] or None.
        codes: how x becomes c, `sign` or `levels`; its shift is [C].
        kernel, stride, padding: (height, width) each.
        residual: what follows: z = y + shortcut + shift_in, and y = (z > 0 ? z : slope * z) + shift_out.

    Returns:
        [N, O, H', W'] in the type of x, contiguous; H' = floor((H + 2 pad - kernel) / stride) + 1, W' alike. Computed
        in float32.

    Raises:
        ValueError: shapes, types or codes that do not fit, or a kernel larger than the padded image.
    """
    described = (codes.kind, codes.width, codes.low, codes.scale, codes.shift)
    geometry = (kernel, stride, padding)
    return torch.ops.rebnn.conv2d(x, bits, layout, weight_scale, bias, *described, *geometry, residual)


def embedding(indices: Tensor, bits: Tensor, weight_scale: Tensor, width: int) -> Tensor:
    """`weight_scale_i * b_i` for each index i by the C library: [...] -> [..., width]."""
    return torch.ops.rebnn.embedding(indices, bits, weight_scale, width)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    threshold: Tensor,
    scale: Tensor,
) -> Tensor:
    """1-bit attention by the C library: popcounts for scores and for the sum of values (`rebnn_attention`).

    Args:
        query, key, value: [B, H, S, d], of which the signs count; d a multiple of 16 up to 240.
        mask: as for `encoder`.
        table: exp(score) by the number of different bits, [d + 1], not rising; None: keys count where the product of
            the signs is not negative.
        threshold: [1], the share of the sum from which a key counts.
        scale: [1], multiplies the sum of the values' signs.

    Returns:
        [B, S, H, d].
    """
    return torch.ops.rebnn.attention(query, key, value, mask, table, threshold, scale)


def encoder(hidden: Tensor, mask: Tensor | None, image: Tensor) -> Tensor:
    """A stack of fully binary BERT layers by the C library.

    Args:
        hidden: [B, S, D].
        mask: None, or what transformers adds to scores, [B, 1, S, S] or [B, 1, 1, S] (B may be 1): 0 for keys that
            count, for all queries of a sequence the same, and at most `EXCLUDED` for the others.
        image: see `image.py`.

    Returns:
        [B, S, D], zero at padded positions.
    """
    return torch.ops.rebnn.encoder(hidden, mask, image)


FLOAT_ROWS = 256
"""Rows of signs that are unpacked at a time for products with float inputs."""


def _linear(x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift):
    inputs = x.shape[-1]
    if bits.dtype != torch.uint8 or bits.shape[1] != (inputs + 7) // 8:
        raise ValueError(
            f"bits of {inputs} features are uint8 [O, {(inputs + 7) // 8}], got {bits.dtype} {(*bits.shape,)}."
        )
    rows = _floats(x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), inputs))
    weight_scale, bias = _floats(weight_scale), _floats(bias)
    if codes == "float":
        y = _float_product(rows, bits) * weight_scale
        y = y if bias is None else y.add_(bias)
    else:
        kind = Codes(codes, width).layout
        layout = cpu.layout(bits, inputs, kind) if layout is None else layout
        scale = 1.0 if input_scale is None else float(input_scale)
        y = cpu.linear(rows, layout, weight_scale, bias, codes, width, low, scale, _floats(shift))
        if codes == "token":
            _keep_nan(rows, y)
    return y.view(*x.shape[:-1], len(bits)).to(x.dtype)


def _keep_nan(rows: Tensor, y: Tensor) -> None:
    """Make rows of y NaN whose inputs give no scale, as floats do: with a NaN or an infinity among them."""
    suspects = (~rows.sum(-1).isfinite()).nonzero().flatten()  # or with a sum that is too large
    if len(suspects):
        y[suspects[~rows[suspects].isfinite().all(-1)]] = math.nan


def _conv2d(
    x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift, kernel, stride, padding, residual=None
):
    if x.ndim != 4:
        raise ValueError(f"x must be images [batch, channels, height, width], got a shape of {(*x.shape,)}.")
    features = x.shape[1] * math.prod(kernel)
    if bits.dtype != torch.uint8 or bits.shape != (weight_scale.numel(), (features + 7) // 8):
        raise ValueError(
            f"bits of {x.shape[1]} channels, a kernel of {(*kernel,)} and {weight_scale.numel()} outputs are uint8 "
            f"{(weight_scale.numel(), (features + 7) // 8)}, got {bits.dtype} {(*bits.shape,)}."
        )
    layout = cpu.conv_layout(bits, x.shape[1], kernel, Codes(codes, width).layout) if layout is None else layout
    scale = 1.0 if input_scale is None else float(input_scale)
    tensors = (_floats(x), layout, _floats(weight_scale), _floats(bias))
    residual = None if residual is None else [_floats(tensor) for tensor in residual]
    y = cpu.conv2d(*tensors, codes, width, low, scale, _floats(shift), kernel, stride, padding, residual)
    return y.to(x.dtype)


def _floats(tensor: Tensor | None) -> Tensor | None:
    """As the C library reads it; itself where it is so already."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().float().contiguous()


def _float_product(x: Tensor, bits: Tensor) -> Tensor:
    """x b^T [N, O] without a float copy of all of b."""
    product = x.new_empty(len(x), len(bits))
    ones = x.new_ones(FLOAT_ROWS)
    for start in range(0, len(bits), FLOAT_ROWS):
        block = bits[start : start + FLOAT_ROWS]
        signs = cpu.embedding(torch.arange(len(block)), block, ones[: len(block)], x.shape[-1])
        product[:, start : start + len(block)] = F.linear(x, signs)
    return product


def _embedding(indices, bits, weight_scale, width):
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}.")
    rows = cpu.embedding(indices.reshape(-1).long().contiguous(), bits.contiguous(), _floats(weight_scale), width)
    return rows.view(*indices.shape, width).to(weight_scale.dtype)


def _attention(query, key, value, mask, table, threshold, scale):
    mask = None if mask is None else padding_mask(mask, query.shape[2]).expand(len(query), -1)
    signed = map(_floats, (query, key, value))
    return cpu.attention(*signed, mask, _floats(table), float(threshold), float(scale)).to(query.dtype)


def _encoder(hidden, mask, image):
    result = hidden.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    mask = None if mask is None else padding_mask(mask, hidden.shape[1]).expand(len(hidden), -1)
    cpu.encoder(result, mask, image)
    return result.to(hidden.dtype)


EXCLUDED = -1e4
"""A number that keeps a key out whatever its score; a score that a mask only lowers is not padding."""


def is_padding(mask: Tensor, length: int) -> bool:
    """Whether a mask of scores says of each key the same to all queries: it counts, or it does not."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-1] != length or not mask.shape[2]:
        return False
    first = mask[:, :, :1]
    plain = mask.dtype == torch.bool or bool(((first == 0) | (first <= EXCLUDED)).all())
    return plain and bool((mask == first).all())


def padding_mask(mask: Tensor, length: int) -> Tensor:
    """Which positions count, bool [B, S], from a mask of scores [B, 1, ..., S].

    Raises:
        ValueError: the mask depends on the query.
    """
    if not is_padding(mask, length):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} says more than which tokens are padding, and the engine's attention "
            "reads padding only; use rebnn_hf.kernels.set_backend('reference') for other masks."
        )
    return mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0


for _name, _function in (
    ("linear", _linear),
    ("conv2d", _conv2d),
    ("embedding", _embedding),
    ("attention", _attention),
    ("encoder", _encoder),
):
    _library.impl(_name, _function, "CPU")


@torch.library.register_fake("rebnn::linear")
def _(x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift):
    return x.new_empty(*x.shape[:-1], bits.shape[0])


@torch.library.register_fake("rebnn::conv2d")
def _(
    x, bits, layout, weight_scale, bias, codes, width, low, input_scale, shift, kernel, stride, padding, residual=None
):
    spatial = zip(x.shape[2:], padding, kernel, stride, strict=True)
    size = [(length + 2 * pad - k) // step + 1 for length, pad, k, step in spatial]
    return x.new_empty(x.shape[0], bits.shape[0], *size)


@torch.library.register_fake("rebnn::embedding")
def _(indices, bits, weight_scale, width):
    return weight_scale.new_empty(*indices.shape, width)


@torch.library.register_fake("rebnn::attention")
def _(query, key, value, mask, table, threshold, scale):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


@torch.library.register_fake("rebnn::encoder")
def _(hidden, mask, image):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)
