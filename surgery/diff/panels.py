"""Reduce one tensor to four small pictures: |W_pre|, |Δ|, |Δ| / |W_pre| and FAPM's score (FAPM paper, Figures 3 and 8).

A tensor is treated as a matrix whose columns are its last dimension. A matrix larger than SIDE on a side is reduced while it
streams: each cell is the mean of the finite entries of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.diff.measure import Matched
from surgery.engines import kernels
from surgery.engines.chunks import Chunks, Sides
from surgery.methods import fapm, relative

# The most cells on a side of a panel.
SIDE = 512
NAMES = ("weight", "delta", "ratio", "score")

Cells = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Panels:
    """The four quantities of a tensor.

    Attributes:
        shape: rows and columns of the matrix.
        cells: by name, float64 [rows ≤ SIDE, columns ≤ SIDE]; NaN where a block has no finite entry.
    """

    shape: tuple[int, int]
    cells: dict[str, Cells]

    @property
    def block(self) -> tuple[float, float]:
        """The mean number of rows and of columns in a cell."""
        rows, columns = self.cells["weight"].shape
        return self.shape[0] / rows, self.shape[1] / columns


def reduce(tensor: Matched) -> Panels:
    """Stream a tensor of both sides twice: once for the mean of |W_pre|, once for the cells.

    Raises:
        CheckpointError: a file ends early or cannot be read.
    """
    shape = tensor.ft.shape
    columns = shape[-1] if shape else 1
    rows = tensor.ft.entries // columns if columns else 0
    across, down = min(columns, SIDE), min(rows, SIDE)
    sums = {name: np.zeros(down * across) for name in NAMES}
    counts = {name: np.zeros(down * across) for name in NAMES}
    chunks = Chunks(lambda _: None)
    with np.errstate(all="ignore"), tensor.pre.open() as pre, tensor.ft.open() as ft:
        sides = Sides(tensor.pre, tensor.ft, pre, ft)
        mean = chunks.mean(sides) if tensor.ft.entries else np.float32(0)
        for start, base, tuned in chunks.read(sides):
            at = np.arange(start, start + len(base))
            cell = at // columns * down // rows * across + at % columns * across // columns
            delta, weight = kernels.task_vector(tensor.pre.dtype, base, tensor.ft.dtype, tuned)
            ratio = relative.score(delta, weight)
            for name, values in zip(NAMES, (weight, delta, ratio, fapm.score(delta, weight, mean)), strict=True):
                finite = np.isfinite(values)
                sums[name] += np.bincount(cell[finite], values[finite], down * across)
                counts[name] += np.bincount(cell[finite], minlength=down * across)
        cells = {name: (sums[name] / counts[name]).reshape(down, across) for name in NAMES}
    return Panels((rows, columns), cells)
