"""This process's part of a tensor sharded over processes, as DTensor: FSDP2 (`fully_shard`) and tensor parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import OptionError
from surgery.optim.noise import Words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor.

    Attributes:
        whole: the whole tensor's shape.
        shape, offset: the box's, in entries along each dimension.
        groups: the processes whose boxes make up the whole, one group for each dimension of the mesh along which it is cut.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    groups: tuple[ProcessGroup, ...]

    @property
    def size(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.whole)

    def positions(self, local: Words) -> Words:
        """Map row-major indices in the box to row-major indices in the whole tensor, int64."""
        result, inner, outer = local * 0, 1, 1
        for whole, size, offset in zip(self.whole[::-1], self.shape[::-1], self.offset[::-1], strict=True):
            result = result + (local // inner % max(size, 1) + offset) * outer
            inner, outer = inner * max(size, 1), outer * whole
        return result

    def add_up(self, counts: torch.Tensor) -> None:
        """Add the counts of all boxes, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(counts, group=group)


def piece_of(tensor: torch.Tensor) -> Piece | None:
    """This process's piece; None where the process holds the whole tensor.

    Raises:
        OptionError: the tensor's processes hold partial sums.
    """
    if not is_spread(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        raise OptionError("MoFO takes no parameter whose processes hold partial sums; shard or replicate it.")
    groups = tuple(
        spread.device_mesh.get_group(axis)
        for axis, placement in enumerate(spread.placements)
        if not placement.is_replicate()
    )
    shape, offset = compute_local_shape_and_global_offset(spread.shape, spread.device_mesh, spread.placements)
    return Piece(tuple(spread.shape), tuple(shape), tuple(offset), groups) if groups else None


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
