"""Edit the singular values of one matrix: of its task vector, or of what fine-tuning made of it.

A decomposition is that of the smaller Gram matrix, ΔᵀΔ or ΔΔᵀ, summed in float64 over blocks of rows (of columns, where
the matrix is wider than high), so that neither model's matrix is ever in memory. Singular values are the roots of its
eigenvalues: exact to about 10⁻⁸ of the largest one. The tensor is read two or three times: for the Gram matrix, for the
other side's vectors, to write.

Memory, with s the smaller side and l the larger: about five times 8 · s² bytes, for the Gram matrix, its sum, and what
LAPACK needs beside them, and 8 · s · l where the matrix is wider than high. One matrix at a time, with all threads of the
BLAS library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import Array, narrow, widen
from surgery.checkpoint.tensor import Sink
from surgery.engines import kernels
from surgery.engines.chunks import Sides
from surgery.engines.prune import take
from surgery.engines.results import Result, Sums
from surgery.engines.rows import Matrix, raw_entries
from surgery.engines.worker import Shifted, Worker
from surgery.errors import CheckpointError
from surgery.methods.actions import Keep, Reset, Shrink, Soften

# Entries of a block: 16 MiB in float64, so that the product pays for going over the Gram matrix.
BLOCK = 1 << 21
# An eigenvalue of a Gram matrix below this share of the largest is rounding.
ROUNDING = 1e-14

Wide = NDArray[np.float64]
one_at_a_time = threading.Lock()


class Algebra(Protocol):
    """Where matrices are multiplied and decomposed. What `put` returns knows `@` and `.T`."""

    def put(self, array: Wide) -> Any:
        """The array, there."""

    def take(self, array: Any) -> Wide:
        """The array, in numpy."""

    def eigh(self, gram: Any) -> tuple[Any, Any]:
        """Eigenvalues, rising, and eigenvectors, in columns, of a symmetric matrix."""


class OnProcessor:
    """numpy's."""

    def put(self, array: Wide) -> Wide:
        return array

    def take(self, array: Wide) -> Wide:
        return array

    def eigh(self, gram: Wide) -> tuple[Wide, Wide]:
        values, vectors = np.linalg.eigh(gram)
        return values, vectors


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values, falling, and the singular vectors of the smaller side, in columns: right ones unless `wide`."""

    values: Wide
    vectors: Any


class Blocks:
    """A matrix of pre and its like of ft, read in blocks as float64.

    Attributes:
        wide: it is wider than high, so that its smaller Gram matrix is that of its rows.
    """

    def __init__(self, worker: Worker, sides: Sides, algebra: Algebra) -> None:
        self.worker, self.sides, self.algebra = worker, sides, algebra
        self.height, self.width = sides.ft.shape[-2:]
        self.matrix = Matrix(sides, 0, self.height, self.width, np.ones((1, 1), np.float32))
        self.wide = self.width > self.height

    def rows(self) -> Iterator[tuple[int, Array, Array]]:
        """(first row, raw pre, raw ft) of each block of rows."""
        step = max(BLOCK // self.width, 1)
        for first in range(0, self.height, step):
            count = min(step, self.height - first)
            yield first, *raw_entries(self.worker, self.matrix, first * self.width, count * self.width)

    def thin(self) -> Iterator[tuple[Any, Any]]:
        """(pre, Δ) of each block along the larger side, [block, smaller side]."""
        if not self.wide:
            for _, base, tuned in self.rows():
                yield self.put(base, tuned)
            return
        step = max(BLOCK // self.height, 1)
        for left in range(0, self.width, step):
            count = min(step, self.width - left)
            parts = [
                raw_entries(self.worker, self.matrix, row * self.width + left, count) for row in range(self.height)
            ]
            base, delta = self.values(*(np.concatenate(side) for side in zip(*parts, strict=True)))
            put = self.algebra.put
            yield put(base.reshape(self.height, count).T), put(delta.reshape(self.height, count).T)

    def values(self, base: Array, tuned: Array) -> tuple[Wide, Wide]:
        """(pre, Δ) of raw entries, float64; Δ is rounded to float32 unless an input is float64."""
        wide = widen(self.sides.pre.dtype, base)
        return wide.astype(np.float64), (widen(self.sides.ft.dtype, tuned) - wide).astype(np.float64)

    def put(self, base: Array, tuned: Array) -> tuple[Any, Any]:
        """The same of whole rows, [rows, width], where the algebra is done."""
        base, delta = self.values(base, tuned)
        put = self.algebra.put
        return put(base.reshape(-1, self.width)), put(delta.reshape(-1, self.width))

    def spectrum(self, gram: Any) -> Spectrum:
        values, vectors = self.algebra.eigh(gram)
        found = self.algebra.take(values)[::-1]
        return Spectrum(np.sqrt(np.maximum(found, 0)), vectors)

    def finite(self, *grams: Any) -> bool:
        return all(np.isfinite(float(gram.trace())) for gram in grams)


def shrink(worker: Worker, action: Shrink, sides: Sides, sink: Sink, algebra: Algebra) -> Result:
    """Write pre and the part of Δ whose singular values are kept, of one matrix or of several that are stacked.

    Raises:
        CheckpointError: a file ends early, or a number is too large for ft's type.
    """
    return _each(worker, sides, sink, algebra, lambda blocks, part: _shrink(blocks, action, part))


def soften(worker: Worker, action: Soften, sides: Sides, sink: Sink, algebra: Algebra) -> Result:
    """Write ft with some of its leading singular values nearer to what pre has there, likewise."""
    return _each(worker, sides, sink, algebra, lambda blocks, part: _soften(blocks, action, part))


def of_task_vector(blocks: Blocks) -> Spectrum | None:
    """The singular values of Δ, and the vectors of the smaller side; None where a number is not finite or there is none."""
    if not blocks.sides.ft.entries:
        return None
    gram: Any = 0.0
    for _, delta in blocks.thin():
        gram = gram + delta.T @ delta
    return blocks.spectrum(gram) if blocks.finite(gram) else None


def _each(worker: Worker, sides: Sides, sink: Sink, algebra: Algebra, edit: Callable[[Blocks, Sink], Result]) -> Result:
    """Edit each matrix of a tensor, one matrix of any tensor at a time."""
    if len(sides.ft.shape) == 2:
        with one_at_a_time:
            return replace(edit(Blocks(worker, sides, algebra), sink), kept=None, pruned=None)
    sums = Result(None, None, 0, 0.0, 0.0, 0.0)
    for number in range(sides.ft.shape[0]):
        part = sides.rows(number, number + 1)
        with one_at_a_time:
            sums += edit(Blocks(worker, part, algebra), Shifted(sink, part.ft.start - sides.ft.start))
    return replace(sums, kept=None, pruned=None)


def _shrink(blocks: Blocks, action: Shrink, sink: Sink) -> Result:
    spectrum = of_task_vector(blocks)
    if spectrum is None:
        return take(blocks.worker, Keep(), blocks.sides, sink)
    count = int(np.count_nonzero(action.keep(spectrum.values, blocks.height, blocks.width)))
    if count in (0, len(spectrum.values)):
        return take(blocks.worker, Reset() if count == 0 else Keep(), blocks.sides, sink)
    kept = spectrum.vectors[:, len(spectrum.values) - count :]
    if not blocks.wide:
        return _write(blocks, sink, lambda _, delta: (delta @ kept) @ kept.T)
    other: Any = 0.0
    for first, base, tuned in blocks.rows():
        _, delta = blocks.put(base, tuned)
        other = other + kept[first : first + len(delta)].T @ delta
    return _write(blocks, sink, lambda first, delta: kept[first : first + len(delta)] @ other)


def _soften(blocks: Blocks, action: Soften, sink: Sink) -> Result:
    ends = intruders(blocks, action.k)
    if ends is None:
        return take(blocks.worker, Keep(), blocks.sides, sink)
    factors = action.factors(ends.cosines)
    if (factors == 1).all():
        return take(blocks.worker, Keep(), blocks.sides, sink)
    put = blocks.algebra.put
    left, right = put(ends.left * ((factors - 1) * ends.change)), put(np.ascontiguousarray(ends.right.T))
    return _write(blocks, sink, lambda first, delta: delta + left[first : first + len(delta)] @ right)


@dataclass(frozen=True, slots=True)
class Leading:
    """The leading singular vectors of ft's matrix, and how they stand to pre.

    Attributes:
        left, right: [height, k] and [width, k].
        cosines: [k], the largest |cosine| of each left one with any left singular vector of pre's matrix.
        change: [k], uᵀΔv: how much of the singular value is due to Δ.
    """

    left: Wide
    right: Wide
    cosines: Wide
    change: Wide


def intruders(blocks: Blocks, k: int) -> Leading | None:
    """Compare the k leading left singular vectors of ft's matrix with all of pre's; None where a number is not finite."""
    if not blocks.sides.ft.entries:
        return None
    before: Any = 0.0
    after: Any = 0.0
    for base, delta in blocks.thin():
        tuned = base + delta
        before, after = before + base.T @ base, after + tuned.T @ tuned
    if not blocks.finite(before, after):
        return None
    algebra = blocks.algebra
    mine = blocks.spectrum(after)
    del after
    k = min(k, int(np.count_nonzero(mine.values**2 > ROUNDING * mine.values[0] ** 2)))
    if k == 0:
        return Leading(np.zeros((blocks.height, 0)), np.zeros((blocks.width, 0)), np.zeros(0), np.zeros(0))
    lead, sizes = algebra.put(np.ascontiguousarray(algebra.take(mine.vectors)[:, ::-1][:, :k])), mine.values[:k]
    del mine
    theirs = blocks.spectrum(before)
    del before
    left: list[Wide] = []
    onto: Any = 0.0
    moved: Any = 0.0
    other: Any = 0.0
    for first, base, tuned in blocks.rows():
        start, delta = blocks.put(base, tuned)
        if blocks.wide:
            vectors = lead[first : first + len(delta)]
            other, moved = other + (start + delta).T @ vectors, moved + delta.T @ vectors
        else:
            vectors = (start + delta) @ lead / algebra.put(sizes)
            onto, moved = onto + start.T @ vectors, moved + delta.T @ vectors
            left.append(algebra.take(vectors))
    basis, moved = algebra.take(theirs.vectors)[:, ::-1], algebra.take(moved)
    if blocks.wide:
        right = algebra.take(other) / sizes
        cosines = abs(basis.T @ algebra.take(lead))
        return Leading(algebra.take(lead), right, cosines.max(axis=0), (moved * right).sum(axis=0))
    real = theirs.values**2 > ROUNDING * theirs.values[0] ** 2
    cosines = abs(basis.T @ algebra.take(onto))[real] / theirs.values[real, None]
    right = algebra.take(lead)
    return Leading(np.concatenate(left), right, cosines.max(axis=0, initial=0.0), (moved * right).sum(axis=0))


def _write(blocks: Blocks, sink: Sink, edited: Any) -> Result:
    """Write pre plus an edited Δ, row by row.

    Args:
        edited: (first row, Δ of a block) -> what it becomes, likewise.
    """
    pre, ft, sums = blocks.sides.pre, blocks.sides.ft, Sums()
    for first, base, tuned in blocks.rows():
        start, delta = blocks.put(base, tuned)
        out = narrow(blocks.algebra.take(start + edited(first, delta)).ravel(), ft.dtype)
        if not blocks.worker.allow_nonfinite and not np.isfinite(widen(ft.dtype, out)).all():
            raise CheckpointError(
                f"{ft.name} of {ft.path} becomes too large for {ft.dtype} when it is edited. Allow it with `allow_nonfinite`."
            )
        # What is ft's value keeps ft's bits: 0 may have been −0.
        word = np.dtype(f"u{out.itemsize}")
        same = widen(ft.dtype, out) == widen(ft.dtype, tuned)
        out = np.where(same, tuned.view(word), out.view(word)).view(out.dtype)
        after = kernels.distance(pre.dtype, base, ft.dtype, out)
        sums.add(kernels.distance(pre.dtype, base, ft.dtype, tuned), after.delta2, after.differ)
        sink.write(first * blocks.width * out.itemsize, memoryview(out))
    return sums.result(None, None)
