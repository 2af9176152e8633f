"""One tensor with an adapter on it, computed while the tensor is read.

    LoRA    W' = W + s · B·A                              (Hu et al., arXiv 2106.09685, Eq. 3)
    DoRA    W' = m · (W + s · B·A) / ‖W + s · B·A‖        (Liu et al., arXiv 2402.09353, Eq. 5; a norm for each output)
    (IA)³   W' = l · W by rows or by columns              (Liu et al., arXiv 2205.05638, Sec. 3.3)
    tokens  some rows of W are replaced

with A [r, in], B [out, r], s = α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732). It is rounded as by peft's
`merge_and_unload` on a CPU: all is float32 (float64 where W is), and the result is rounded once to the type of W; where it is
said, s · B·A is rounded to that type before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Array, Floats, narrow, widen
from surgery.checkpoint.formats.low_rank import Delta, Loaded, numbers, run
from surgery.checkpoint.tensor import Handle, Tensor

# Entries that are worked on at once: the float64 product and the float32 sum stay in a core's cache.
BLOCK = 1 << 14


class Before:
    """A tensor opened for reading, its numbers cast to a type."""

    def __init__(self, tensor: Tensor, dtype: str) -> None:
        self.tensor, self.dtype, self.reader = tensor, dtype, tensor.open()

    def fill(self, first: int, out: Array) -> None:
        """Put the stored numbers from entry `first` on into `out`."""
        if self.tensor.dtype == self.dtype:
            self.reader.fill(first * out.itemsize, memoryview(out.view(np.uint8)))
            return
        raw = np.empty(BLOCK, RAW[self.tensor.dtype])
        for start in range(0, len(out), BLOCK):
            part = raw[: len(out) - start]
            self.reader.fill((first + start) * raw.itemsize, memoryview(part.view(np.uint8)))
            out[start : start + BLOCK] = narrow(widen(self.tensor.dtype, part), self.dtype)

    def values(self, first: int, count: int) -> Array:
        """The same as float32 or float64."""
        raw = np.empty(count, RAW[self.dtype])
        self.fill(first, raw)
        return widen(self.dtype, raw)


class Step(Protocol):
    """A change whose factors are in memory."""

    def fill(self, before: Before, first: int, out: Array) -> None:
        """Put the changed numbers from entry `first` on into `out`, as they are stored."""


class Change(Protocol):
    """A change of a weight."""

    def open(self) -> Step:
        """Read what it needs."""


@dataclass(frozen=True, slots=True)
class Added:
    """W + delta.

    Attributes:
        twice: delta is rounded to the type of W before, as peft does with an embedding and with stacked experts.
    """

    delta: Delta
    twice: bool = False

    def open(self) -> OpenAdded:
        return OpenAdded(self.delta.load(), self.twice)


class OpenAdded:
    """The same, opened."""

    def __init__(self, delta: Loaded, twice: bool) -> None:
        self.delta, self.twice = delta, twice

    def fill(self, before: Before, first: int, out: Array) -> None:
        before.fill(first, out)
        for start in range(0, len(out), BLOCK):
            part = out[start : start + BLOCK]
            delta = run(self.delta, first + start, len(part))
            added = widen(before.dtype, narrow(delta, before.dtype)) if self.twice else delta
            part[:] = narrow(widen(before.dtype, part) + added, before.dtype)


@dataclass(frozen=True, slots=True)
class RowScaled:
    """DoRA: each row of W + delta, which is one output's weights, brought to its length in `magnitude` (as many as rows).

    A row is read as a whole.
    """

    delta: Delta
    magnitude: Tensor

    def open(self) -> OpenRowScaled:
        return OpenRowScaled(self.delta.load(), numbers(self.magnitude).reshape(-1))


class OpenRowScaled:
    """The same, opened."""

    def __init__(self, delta: Loaded, magnitude: Floats) -> None:
        self.delta, self.magnitude = delta, magnitude

    def fill(self, before: Before, first: int, out: Array) -> None:
        import torch

        width, end = self.delta.width, first + len(out)
        for row, rows in _row_groups(first, end, width):
            start, count = row * width, rows * width
            values = (before.values(start, count) + run(self.delta, start, count)).reshape(rows, width)
            # By torch, whose order of the sum depends on the processor; it does not depend on the number of rows.
            lengths = torch.linalg.norm(torch.from_numpy(values), dim=1).numpy()
            values *= (self.magnitude[row : row + rows] / lengths)[:, None]
            begin, stop = max(first, start), min(end, start + count)
            out[begin - first : stop - first] = narrow(values.reshape(-1)[begin - start : stop - start], before.dtype)


def _row_groups(first: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """The whole rows that the entries [first, end) lie in, as (row, number of rows), in groups of about a block."""
    most, last = max(BLOCK // width, 1), -(-end // width)
    for row in range(first // width, last, most):
        yield row, min(most, last - row)


class ColumnScaled:
    """DoRA where outputs are columns, of GPT-2's Conv1D and of an embedding: `magnitude` has as many numbers as columns.

    The weight is read once more before, for the lengths; they are kept for the next time.
    """

    def __init__(self, delta: Delta, magnitude: Tensor) -> None:
        self.delta, self.magnitude = delta, magnitude
        self.lock, self.factors = threading.Lock(), None

    factors: Array | None

    def open(self) -> OpenColumnScaled:
        return OpenColumnScaled(self, self.delta.load())

    def measured(self, before: Before, delta: Loaded) -> Array:
        """magnitude / length for each column."""
        with self.lock:
            if self.factors is None:
                width = delta.width
                squares: Array = np.zeros(width, np.float32)
                for row, rows in _row_groups(0, before.tensor.entries, width):
                    values = before.values(row * width, rows * width) + run(delta, row * width, rows * width)
                    for line in values.reshape(rows, width):  # in order, as torch sums
                        squares = squares + line * line
                self.factors = numbers(self.magnitude).reshape(-1) / np.sqrt(squares)
            return self.factors


class OpenColumnScaled:
    """The same, opened."""

    def __init__(self, change: ColumnScaled, delta: Loaded) -> None:
        self.change, self.delta = change, delta

    def fill(self, before: Before, first: int, out: Array) -> None:
        factors, width = self.change.measured(before, self.delta), self.delta.width
        for start in range(0, len(out), BLOCK):
            part = out[start : start + BLOCK]
            values = before.values(first + start, len(part)) + run(self.delta, first + start, len(part))
            values *= factors[np.arange(first + start, first + start + len(part)) % width]
            part[:] = narrow(values, before.dtype)


@dataclass(frozen=True, slots=True)
class Multiplied:
    """W with each row, or each column, times a number.

    Attributes:
        vector: as many numbers as rows or columns.
        width: how many columns W has; of a vector, its length.
    """

    vector: Tensor
    columns: bool
    width: int

    def open(self) -> OpenMultiplied:
        return OpenMultiplied(numbers(self.vector).reshape(-1), 1 if self.columns else self.width)


class OpenMultiplied:
    """The same, opened.

    Attributes:
        span: entries, one after the other, that are multiplied by the same number; after the last number comes the first again.
    """

    def __init__(self, vector: Floats, span: int) -> None:
        self.vector, self.span = vector, span

    def fill(self, before: Before, first: int, out: Array) -> None:
        before.fill(first, out)
        for start in range(0, len(out), BLOCK):
            part = out[start : start + BLOCK]
            places = np.arange(first + start, first + start + len(part)) // self.span % len(self.vector)
            part[:] = narrow(widen(before.dtype, part) * self.vector[places], before.dtype)


@dataclass(frozen=True, slots=True)
class Replaced:
    """Some rows of W are others.

    Attributes:
        rows: [n, columns].
        indices: of the n rows in W.
    """

    rows: Tensor
    indices: tuple[int, ...]

    def open(self) -> OpenReplaced:
        return OpenReplaced(numbers(self.rows), np.array(self.indices, np.int64))


class OpenReplaced:
    """The same, opened."""

    def __init__(self, rows: Floats, indices: NDArray[np.int64]) -> None:
        self.rows, self.indices = rows, indices

    def fill(self, before: Before, first: int, out: Array) -> None:
        before.fill(first, out)
        width, end = self.rows.shape[1], first + len(out)
        for place in np.flatnonzero((self.indices >= first // width) & (self.indices * width < end)):
            start = int(self.indices[place]) * width
            begin, stop = max(first, start), min(end, start + width)
            out[begin - first : stop - first] = narrow(self.rows[place, begin - start : stop - start], before.dtype)


@dataclass(frozen=True, slots=True)
class Computed:
    """The numbers of a tensor, cast to a type, and changed.

    Attributes:
        path: the file to name when something is wrong with them.
    """

    path: Path
    before: Tensor
    dtype: str
    change: Change | None = None

    def open(self) -> Handle:
        return OpenComputed(self)


class OpenComputed:
    """The parts of a change in memory, and the tensor that it is made to opened for reading."""

    def __init__(self, data: Computed) -> None:
        self.step = data.change.open() if data.change else None
        self.dtype, self.before = data.dtype, Before(data.before, data.dtype)

    def close(self) -> None:
        self.before.reader.close()

    def read(self, offset: int, view: memoryview) -> None:
        size = RAW[self.dtype].itemsize
        first, last = offset // size, -(-(offset + len(view)) // size)
        if (last - first) * size != len(view):  # not whole entries
            entries = memoryview(bytearray((last - first) * size))
            self.read(first * size, entries)
            view[:] = entries[offset - first * size :][: len(view)]
            return
        with np.errstate(all="ignore"):
            (self.step.fill if self.step else _unchanged)(self.before, first, np.frombuffer(view, RAW[self.dtype]))


def _unchanged(before: Before, first: int, out: Array) -> None:
    before.fill(first, out)
