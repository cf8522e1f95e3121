"""The image of an encoder: everything the C library needs of it in one buffer (`csrc/encoder.h`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

MAGIC, VERSION = 0x4E4E4252, 1
HEADER = 16
ALIGNMENT = 64
FIELDS = (
    *(f"{name}_{part}" for name, part in product(("query", "key", "value"), ("shift", "layout", "few", "many"))),
    *("table", "threshold"),
    *("context", "output_layout", "output_scale", "output_bias"),
    *("output_norm_weight", "output_norm_bias", "output_eps"),
    *("inner_shift", "inner_layout", "inner_few", "inner_many", "inner_unsigned"),
    *("outer_layout", "outer_scale", "outer_bias", "outer_norm_weight", "outer_norm_bias", "outer_eps"),
)
"""In the order of the enumeration in encoder.h, which says what each of them is."""


def make_image(width: int, heads: int, inner: int, layers: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
    """Join the fields of all layers.

    Args:
        width: D.
        heads: of the attention.
        inner: size of the feed-forward block.
        layers: the tensors named in `FIELDS` of each layer; None for a shift or a table that is not there.

    Returns:
        uint8 [bytes].
    """
    header = [MAGIC, VERSION, len(layers), width, heads, width // heads, inner, len(FIELDS)]
    header += [0] * (HEADER - len(header))
    offsets, parts = [], []
    end = _aligned((HEADER + len(layers) * len(FIELDS)) * 8)
    for layer in layers:
        for name in FIELDS:
            data = None if layer[name] is None else layer[name].detach().contiguous().flatten().view(torch.uint8)
            offsets.append(0 if data is None else end)
            if data is not None:
                parts.append((end, data))
                end = _aligned(end + len(data))
    image = torch.zeros(end, dtype=torch.uint8)
    start = torch.tensor(header + offsets).view(torch.uint8)
    for offset, data in [(0, start), *parts]:
        image[offset : offset + len(data)] = data
    return image


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
