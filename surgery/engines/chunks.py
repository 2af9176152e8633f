"""A tensor of pre and its like of ft, read side by side in chunks that fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import RAW, Array
from surgery.checkpoint.tensor import Reader, Tensor
from surgery.engines import kernels

# Entries of a chunk: both raw chunks stay in a core's second cache, and the interpreter lock changes hands seldom.
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Sides:
    """A tensor of pre and its like of ft, of the same shape, open."""

    pre: Tensor
    ft: Tensor
    read_pre: Reader
    read_ft: Reader

    def rows(self, first: int, last: int) -> Sides:
        """The same of a slice [first, last) of the outermost dimension."""
        pre, ft = self.read_pre.rows(first, last), self.read_ft.rows(first, last)
        return Sides(pre.tensor, ft.tensor, pre, ft)


class Chunks:
    """One worker's buffers to read into.

    Args:
        tick: called with the number of bytes that were read; may raise to stop the work.
    """

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.tick = tick
        self.raw_pre, self.raw_ft = bytearray(8 * CHUNK), bytearray(8 * CHUNK)

    def read(self, sides: Sides, *, backwards: bool = False) -> Iterator[tuple[int, Array, Array]]:
        """(start, raw pre, raw ft) of each chunk; the arrays are overwritten by the next.

        A pass that goes the other way than the one before begins with what that one left in the cache.

        Raises:
            CheckpointError: a file ends early or cannot be read.
        """
        pre, ft = sides.pre, sides.ft
        pre_type, ft_type = RAW[pre.dtype], RAW[ft.dtype]
        starts = range(0, ft.entries, CHUNK)
        for start in reversed(starts) if backwards else starts:
            count = min(CHUNK, ft.entries - start)
            base = memoryview(self.raw_pre)[: count * pre_type.itemsize]
            tuned = memoryview(self.raw_ft)[: count * ft_type.itemsize]
            self.tick(
                sides.read_pre.fill(start * pre_type.itemsize, base)
                + sides.read_ft.fill(start * ft_type.itemsize, tuned)
            )
            yield start, np.frombuffer(base, pre_type), np.frombuffer(tuned, ft_type)

    def mean(self, sides: Sides) -> np.float32:
        """mean |W_pre|: summed in float64, then float32.

        Raises:
            CheckpointError: a file ends early or cannot be read.
        """
        pre, total, itemsize = sides.pre, 0.0, RAW[sides.pre.dtype].itemsize
        for start in range(0, pre.entries, CHUNK):
            count = min(CHUNK, pre.entries - start)
            view = memoryview(self.raw_pre)[: count * itemsize]
            self.tick(sides.read_pre.fill(start * itemsize, view))
            total += kernels.abs_sum(pre.dtype, np.frombuffer(view, RAW[pre.dtype]))
        return np.float32(total / pre.entries)
