"""What an adapter makes of one tensor, computed while the tensor is read.

    LoRA    W' = W + s · B·A                              (Hu et al., arXiv 2106.09685, Eq. 3)
    DoRA    W' = m · (W + s · B·A) / ‖W + s · B·A‖        (Liu et al., arXiv 2402.09353, Eq. 5; a norm for each output)
    tokens  some rows of W are replaced

with A [r, in], B [out, r], s = α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732). It is rounded as by peft's
`merge_and_unload` on a CPU: all is float32 (float64 where W is), and the result is rounded once to the type of W; where it is
said, s · B·A is rounded to that type before.

BLAS does not promise that the bits of an entry of B·A do not depend on which others are asked for with it. So an entry is summed
here, over r in order, by fused multiply-adds; a BLAS that keeps this order gives the same bits. A step is done in float64, where
the product is exact; that rounds twice, which is seldom another number than that of a true fused step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Array, Floats, narrow, widen
from surgery.checkpoint.tensor import Handle, Tensor, read_bytes

# Entries that are worked on at once: the float64 product and the float32 sum stay in a core's cache.
BLOCK = 1 << 14
# Factors of stacked experts that stay in memory.
RECENT = 4
Factor = Callable[[], Floats]


def numbers(tensor: Tensor) -> Floats:
    """A small tensor in float32, in which peft keeps what is trained."""
    raw = np.frombuffer(read_bytes(tensor), RAW[tensor.dtype])
    return widen(tensor.dtype, raw).astype(np.float32).reshape(tensor.shape)


def one() -> Floats:
    """The factor [[1]]."""
    return np.ones((1, 1), np.float32)


def row(tensor: Tensor) -> Floats:
    """A vector [n] as [1, n]."""
    return numbers(tensor).reshape(1, -1)


class Experts:
    """The factors of stacked experts. Those read last are kept, since the experts of a layer are read one after the other."""

    def __init__(self) -> None:
        self.lock, self.recent = threading.Lock(), OrderedDict[Tensor, Floats]()

    def a(self, tensor: Tensor, experts: int, number: int) -> Floats:
        """One expert's A [r, in] of [experts · r, in]: they lie one after the other."""
        rank = tensor.shape[0] // experts
        return numbers(tensor.rows(number * rank, (number + 1) * rank))

    def b(self, tensor: Tensor, experts: int, number: int, rows: slice = slice(None)) -> Floats:
        """Some rows of one expert's B [out, r] of [out, experts · r]: the experts alternate in its columns."""
        with self.lock:
            found = self.recent.pop(tensor, None)
            self.recent[tensor] = found = numbers(tensor) if found is None else found
            if len(self.recent) > RECENT:
                self.recent.popitem(last=False)
        return found[rows, number::experts]


class Loaded(Protocol):
    """A matrix that is computed part by part.

    Attributes:
        width: its columns.
    """

    width: int

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        """Compute a rectangle of it, float32 [rows, columns]."""


class Delta(Protocol):
    """What is added to a weight."""

    def load(self) -> Loaded:
        """Read what it is computed from."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """s · left·right, or its transpose.

    Attributes:
        left, right: give [rows, r] and [r, columns] in float32.
        transposed: it is (left·right)ᵀ, added to a weight that is stored as [in, out].
    """

    left: Factor
    right: Factor
    scale: float
    transposed: bool = False

    def load(self) -> LoadedLowRank:
        left, right = self.left(), self.right()
        return LoadedLowRank(right.T, left.T, self.scale) if self.transposed else LoadedLowRank(left, right, self.scale)


def low_rank(a: Tensor, b: Tensor, scale: float, *, transposed: bool = False) -> LowRank:
    """s · B·A of the factors A [r, in] and B [out, r]."""
    return LowRank(partial(numbers, b), partial(numbers, a), scale, transposed)


class LoadedLowRank:
    """Factors in memory."""

    def __init__(self, left: Floats, right: Floats, scale: float) -> None:
        self.left, self.right, self.scale = left, right.astype(np.float64, order="C"), np.float32(scale)
        self.width = right.shape[1]

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        found = product(self.left[row : row + rows], self.right[:, column : column + columns])
        found *= self.scale
        return found


@dataclass(frozen=True, slots=True)
class Stacked:
    """The matrices of experts, one under the other: what is added to a weight [experts, rows, columns]."""

    experts: Sequence[Delta]
    rows: int

    def load(self) -> LoadedStack:
        return LoadedStack([expert.load() for expert in self.experts], self.rows)


class LoadedStack:
    """The factors of all experts in memory."""

    def __init__(self, experts: Sequence[Loaded], rows: int) -> None:
        self.experts, self.rows, self.width = experts, rows, experts[0].width

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        parts, end = [], row + rows
        while row < end:
            expert, inside = divmod(row, self.rows)
            count = min(end - row, self.rows - inside)
            parts.append(self.experts[expert].part(inside, count, column, columns))
            row += count
        return np.concatenate(parts)


def product(left: Floats, right: NDArray[np.float64]) -> Floats:
    """left [rows, r] · right [r, columns], each entry summed in float32 by fused multiply-adds in the order of r."""
    factors = left.astype(np.float64)
    total = np.zeros((len(left), right.shape[1]), np.float32)
    exact = np.empty(total.shape)
    for k in range(len(right)):
        np.multiply(factors[:, k, None], right[k], out=exact)
        exact += total
        total[...] = exact
    return total


def run(delta: Loaded, start: int, count: int) -> Floats:
    """Some entries of a matrix, counted row by row, from `start` on."""
    out = np.empty(count, np.float32)
    begin = 0
    while begin < count:
        row, column = divmod(start + begin, delta.width)
        rows = 1 if column else max((count - begin) // delta.width, 1)
        columns = min(delta.width - column, count - begin)
        out[begin : begin + rows * columns] = delta.part(row, rows, column, columns).reshape(-1)
        begin += rows * columns
    return out


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
    """What happens to a weight."""

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
    """What a change needs in memory, and the tensor that it is made to opened for reading."""

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
