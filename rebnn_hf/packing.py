"""The bit format: how signs lie in bytes. `docs/format.md` is the written specification.

Row-major, one row per output channel. Element j of a row is bit `j % 8` (least significant first) of byte `j // 8`;
a set bit means +1, a clear bit -1; the spare bits of a row's last byte are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(width: int) -> int:
    """Bytes of a packed row of `width` signs."""
    return (width + 7) // 8


def pack_signs(weight: Tensor) -> Tensor:
    """Pack the signs of each row into bytes; sign(0) = +1.

    Args:
        weight: [..., M], floating point (signs or latent weights), or boolean (true for +1).

    Returns:
        uint8 [..., ceil(M / 8)].

    Raises:
        TypeError: neither floating point nor boolean.
        ValueError: no dimension to pack.
    """
    if not (weight.is_floating_point() or weight.dtype == torch.bool):
        raise TypeError(f"pack_signs expects a floating point or boolean tensor, got {weight.dtype}.")
    if weight.ndim == 0:
        raise ValueError("pack_signs packs the last dimension and got a scalar; pass at least one row.")
    width = weight.shape[-1]
    bits = (weight if weight.dtype == torch.bool else weight >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, packed_width(width) * 8 - width))
    weights_of_bits = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * weights_of_bits).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs of packed rows.

    Args:
        packed: uint8 [..., ceil(width / 8)].
        width: M, the number of signs in a row.
        dtype: of the result.

    Returns:
        -1 or +1, [..., M].

    Raises:
        TypeError: not uint8.
        ValueError: the rows are not of the length that `width` needs.
    """
    _check_packed(packed, width)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(-2)[..., :width]
    return bits.to(dtype).mul_(2).sub_(1)


def has_clean_padding(packed: Tensor, width: int) -> bool:
    """Whether all spare bits are zero, as the format demands.

    Args:
        packed: uint8 [..., ceil(width / 8)].
        width: M.

    Raises:
        TypeError: not uint8.
        ValueError: the rows are not of the length that `width` needs.
    """
    _check_packed(packed, width)
    spare = packed_width(width) * 8 - width
    return spare == 0 or not (packed[..., -1] >> (8 - spare)).any()


def _check_packed(packed: Tensor, width: int) -> None:
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed signs are uint8, got {packed.dtype}.")
    if packed.ndim == 0 or packed.shape[-1] != packed_width(width):
        raise ValueError(
            f"rows of {width} signs take {packed_width(width)} bytes, got shape {tuple(packed.shape)}; "
            "the tensor belongs to another layer or was cut."
        )
