"""Weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) spreads over processes by rows: what this process has.

Outside of forward and backward passes each process holds a contiguous part of the rows of every parameter, a DTensor.
Anything per row can be computed where the row is; sums over rows, and vectors of all rows, take one reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process may have a part only."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The rows of this process, which share memory with the DTensor; another tensor is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this process has: as `torch.chunk` deals them out."""
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    dimension = _sharded_dimension(tensor)
    size = -(-len(tensor) // tensor.device_mesh.size(dimension))
    start = min(tensor.device_mesh.get_local_rank(dimension) * size, len(tensor))
    return slice(start, start + len(tensor.to_local()))


def require_row_shards(name: str, tensor: Tensor) -> None:
    """Refuse a sharded weight whose rows are not whole.

    Raises:
        ValueError: it is sharded by columns, or over more than one dimension of the mesh.
    """
    if not is_sharded(tensor):
        return
    sharded = [placement for placement in tensor.placements if not placement.is_replicate()]
    if len(sharded) != 1 or not sharded[0].is_shard(0):
        raise ValueError(
            f"the weight of {name} is placed as {tuple(map(str, tensor.placements))}, but flips and largest gradients "
            "belong to whole rows; use fully_shard() as it is, which shards by rows over one dimension of the mesh, or "
            "DistributedDataParallel."
        )


def sum_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum of `values` over the processes that share the given tensors; all of them have to call it.

    Without sharded tensors there is nothing to add.
    """
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return values
    values = values.to(sharded.to_local().device)
    torch.distributed.all_reduce(values, group=sharded.device_mesh.get_group(_sharded_dimension(sharded)))
    return values


def _sharded_dimension(tensor: Tensor) -> int:
    """The dimension of the mesh over which rows are spread; the others (HSDP) hold copies."""
    return next(index for index, placement in enumerate(tensor.placements) if placement.is_shard())
