"""Changes of a weight, s · B·A and its like, computed part by part from small factors.

BLAS does not promise that the bits of an entry of B·A do not depend on which others are asked for with it. So an entry is summed
here, over r in order, by fused multiply-adds; a BLAS that keeps this order gives the same bits. A step is done in float64, where
the product is exact; that rounds twice, which is seldom another number than that of a true fused step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Floats, widen
from surgery.checkpoint.tensor import Tensor, read_bytes

# Factors of stacked experts that stay in memory.
RECENT = 4
Factor = Callable[[], Floats]


def numbers(tensor: Tensor) -> Floats:
    """A small tensor in float32, in which peft keeps what is trained."""
    raw = np.frombuffer(read_bytes(tensor), RAW[tensor.dtype])
    return widen(tensor.dtype, raw).astype(np.float32).reshape(tensor.shape)


def matrix(tensor: Tensor) -> Floats:
    """A tensor [n, …] as [n, m]."""
    return numbers(tensor).reshape(tensor.shape[0], -1)


def multiplied(a: Tensor, b: Tensor) -> Floats:
    """a [n, r] · b [r, m], as torch sums it."""
    import torch

    found: Floats = (torch.from_numpy(numbers(a)) @ torch.from_numpy(numbers(b))).numpy()
    return found


def scaled_rows(a: Tensor, e: Tensor) -> Floats:
    """The rows of a [r, m], each times its number in e [r, 1]."""
    return numbers(a) * numbers(e)


def cut_rows(a: Tensor, e: Tensor, rows: int, columns: int) -> Floats:
    """The first rows and columns of a, each row times its number in e [rows]."""
    return np.ascontiguousarray(numbers(a)[:rows, :columns]) * numbers(e).reshape(-1, 1)


def one() -> Floats:
    """The factor [[1]]."""
    return np.ones((1, 1), np.float32)


def row(tensor: Tensor) -> Floats:
    """A vector [n] as [1, n]."""
    return numbers(tensor).reshape(1, -1)


def page(stack: Tensor, number: int) -> Floats:
    """One matrix [rows, columns] of a stack [experts, rows, columns]."""
    return numbers(stack.rows(number, number + 1)).reshape(stack.shape[1:])


def block(a: Tensor, experts: int, number: int) -> Floats:
    """One expert's A [r, in] of [experts · r, in]: they lie one after the other."""
    rank = a.shape[0] // experts
    return numbers(a.rows(number * rank, (number + 1) * rank))


class Experts:
    """The factors B of stacked experts. Those read last are kept, since the experts of a layer are read one after the other."""

    def __init__(self) -> None:
        self.lock, self.recent = threading.Lock(), OrderedDict[Tensor, Floats]()

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
    """A change that is added to a weight."""

    def load(self) -> Loaded:
        """Read what it is computed from."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """s · left·right / d, or its transpose.

    Attributes:
        left, right: give [rows, r] and [r, columns] in float32.
        divisor: d.
        transposed: it is (left·right)ᵀ, added to a weight that is stored as [in, out].
    """

    left: Factor
    right: Factor
    scale: float
    transposed: bool = False
    divisor: float = 1.0

    def load(self) -> LoadedLowRank:
        left, right = self.left(), self.right()
        if self.transposed:
            left, right = right.T, left.T
        return LoadedLowRank(left, right, self.scale, self.divisor)


def low_rank(a: Tensor, b: Tensor, scale: float, *, transposed: bool = False) -> LowRank:
    """s · B·A of the factors A [r, in] and B [out, r]."""
    return LowRank(partial(numbers, b), partial(numbers, a), scale, transposed)


class LoadedLowRank:
    """Factors in memory."""

    def __init__(self, left: Floats, right: Floats, scale: float, divisor: float = 1.0) -> None:
        self.left, self.right, self.width = left, right.astype(np.float64, order="C"), right.shape[1]
        self.scale, self.divisor = np.float32(scale), np.float32(divisor)

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        found = product(self.left[row : row + rows], self.right[:, column : column + columns])
        found *= self.scale
        if self.divisor != 1:
            found /= self.divisor
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


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: s · one ∘ two, entry by entry (Hyeon-Woo et al., arXiv 2108.06098, Proposition 1)."""

    one: Delta
    two: Delta
    scale: float

    def load(self) -> LoadedHadamard:
        return LoadedHadamard(self.one.load(), self.two.load(), self.scale)


class LoadedHadamard:
    """The factors of both in memory."""

    def __init__(self, one: Loaded, two: Loaded, scale: float) -> None:
        self.one, self.two, self.scale, self.width = one, two, np.float32(scale), one.width

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        found = self.one.part(row, rows, column, columns) * self.two.part(row, rows, column, columns)
        found *= self.scale
        return found


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: s · one ⊗ two (Yeh et al., arXiv 2309.14859, Sec. 4.2)."""

    one: Factor
    two: Factor
    scale: float

    def load(self) -> LoadedKronecker:
        return LoadedKronecker(self.one(), self.two(), self.scale)


class LoadedKronecker:
    """Both matrices in memory."""

    def __init__(self, one: Floats, two: Floats, scale: float) -> None:
        self.one, self.two, self.scale, self.width = one, two, np.float32(scale), one.shape[1] * two.shape[1]

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        inner, width = self.two.shape
        down, across = np.arange(row, row + rows)[:, None], np.arange(column, column + columns)
        found: Floats = self.one[down // inner, across // width] * self.two[down % inner, across % width]
        found *= self.scale
        return found


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
