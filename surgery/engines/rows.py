"""Prune every row of a matrix by itself, by |Δ| times a weight for each input feature (Wanda).

Rows that lie one behind the other are scored, sorted and written a few at a time, in one pass. Where a row is a column of the
stored matrix, stripes of columns are gathered first, for the thresholds, and the matrix is written in a second pass. So it is
where the group is the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import RAW, Array, Floats
from surgery.checkpoint.tensor import Reader, Sink
from surgery.engines import kernels
from surgery.engines.chunks import CHUNK, Sides
from surgery.engines.prune import take
from surgery.engines.results import Result, Sums
from surgery.engines.selection import Search, rank, runs
from surgery.engines.worker import Worker
from surgery.methods.actions import Keep, PruneRows, Reset


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as it is stored, [height, width], which begins at an entry of its tensor.

    weights is float32 [1, width], or [height, 1] where the matrix is stored transposed or each of its rows has a weight.
    """

    sides: Sides
    begin: int
    height: int
    width: int
    weights: Floats

    def scores(self, base: Array, tuned: Array, first: int, last: int) -> Floats:
        """|Δ| times the weights, of stored rows [first, last): [rows, width]. NaN counts as −∞."""
        delta, _ = kernels.task_vector(self.sides.pre.dtype, base, self.sides.ft.dtype, tuned)
        weights = self.weights[first:last] if len(self.weights) > 1 else self.weights
        scores = delta.reshape(last - first, self.width) * weights
        scores[np.isnan(scores)] = -np.inf
        return scores


def prune_rows(worker: Worker, action: PruneRows, sides: Sides, sink: Sink) -> Result:
    """Write ft where an entry's score is above the threshold of its group, else pre.

    Args:
        sides: pre and ft of one tensor: a matrix, or several of them stacked.

    Raises:
        CheckpointError: a file ends early, or pre holds a number that does not fit ft's type.
    """
    weights = np.atleast_2d(action.weights)
    entries = sides.ft.entries // len(weights)
    group = entries if action.whole else weights.shape[1]
    r = rank(action.sparsity, group)
    if r in (0, group):
        return take(worker, Keep() if r == 0 else Reset(), sides, sink)
    sums, kept, word = Sums(), 0, np.dtype(f"u{RAW[sides.ft.dtype].itemsize}")
    for matrix in _matrices(action, weights, entries, sides):
        limit = _limit(worker, action, matrix, r)
        for first, base, tuned, scores in stored_rows(worker, matrix):
            keep = scores > (np.partition(scores, r - 1, axis=1)[:, r - 1 : r] if limit is None else limit)
            # Through integers, since a float copy may quieten a NaN's bits.
            cast = worker.cast(base, sides.pre, sides.ft).view(word)
            out = np.where(keep.ravel(), tuned.view(word), cast).view(tuned.dtype)
            before = kernels.distance(sides.pre.dtype, base, sides.ft.dtype, tuned)
            after = kernels.distance(sides.pre.dtype, base, sides.ft.dtype, out)
            sums.add(before, after.delta2, after.differ)
            kept += int(np.count_nonzero(keep))
            sink.write((matrix.begin + first * matrix.width) * out.itemsize, memoryview(out))
    return sums.result(kept, sides.ft.entries - kept)


def _matrices(action: PruneRows, weights: Floats, entries: int, sides: Sides) -> Iterator[Matrix]:
    k = weights.shape[1]
    for number, row in enumerate(weights):
        if action.transposed:
            yield Matrix(sides, number * entries, k, entries // k, row[:, None])
        else:
            yield Matrix(sides, number * entries, entries // k, k, row[None])


def _limit(worker: Worker, action: PruneRows, matrix: Matrix, r: int) -> Floats | np.float32 | None:
    """The threshold of the matrix, or those of its columns [width]; None where every stored row has its own."""
    if action.whole:
        return nth_scores(worker, matrix, [r])[0]
    return _column_limits(worker, matrix, r) if action.transposed else None


def nth_scores(worker: Worker, matrix: Matrix, ranks: Sequence[int]) -> list[np.float32]:
    """The r-th smallest of all scores of a matrix, for each of the ranks r ≥ 1, exactly: a sample and mostly one pass."""
    n = matrix.height * matrix.width
    starts, length = runs(n)
    sample = []
    for start in starts:
        base, tuned = raw_entries(worker, matrix, int(start), length)
        delta, _ = kernels.task_vector(matrix.sides.pre.dtype, base, matrix.sides.ft.dtype, tuned)
        weights = np.broadcast_to(matrix.weights, (matrix.height, matrix.width)).flat[int(start) : int(start) + length]
        sample.append(delta * weights)
    searches = [Search(np.stack(sample), n, r) for r in ranks]
    while waiting := [search for search in searches if not search.found]:
        brackets = [search.bracket() for search in waiting]
        above = np.zeros((len(waiting), 2), np.int64)
        inside = [[np.empty(0, np.float32)] for _ in waiting]
        for *_, scores in stored_rows(worker, matrix):
            for number, (low, high, collect) in enumerate(brackets):
                low_mask, high_mask = scores > low, scores > high
                above[number] += low_mask.sum(), high_mask.sum()
                if collect:
                    inside[number].append(scores[low_mask & ~high_mask])
        for search, counts, found in zip(waiting, above, inside, strict=True):
            search.narrow(int(counts[0]), int(counts[1]), np.concatenate(found))
    return [search.threshold for search in searches]


def _column_limits(worker: Worker, matrix: Matrix, r: int) -> Floats:
    """The r-th smallest score of each column, [width]."""
    limits = np.empty(matrix.width, np.float32)
    stripe = max(CHUNK // matrix.height, 1)
    for left in range(0, matrix.width, stripe):
        right = min(left + stripe, matrix.width)
        gathered = [
            raw_entries(worker, matrix, row * matrix.width + left, right - left) for row in range(matrix.height)
        ]
        base, tuned = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        part = Matrix(matrix.sides, 0, matrix.height, right - left, matrix.weights)
        limits[left:right] = np.partition(part.scores(base, tuned, 0, matrix.height), r - 1, axis=0)[r - 1]
    return limits


def stored_rows(worker: Worker, matrix: Matrix) -> Iterator[tuple[int, Array, Array, Floats]]:
    """(first row, raw pre, raw ft, scores [rows, width]) of as many stored rows at a time as a chunk holds, one at least."""
    step = max(CHUNK // matrix.width, 1)
    for first in range(0, matrix.height, step):
        last = min(first + step, matrix.height)
        base, tuned = raw_entries(worker, matrix, first * matrix.width, (last - first) * matrix.width)
        yield first, base, tuned, matrix.scores(base, tuned, first, last)


def raw_entries(worker: Worker, matrix: Matrix, start: int, count: int) -> tuple[Array, Array]:
    """Entries [start, start + count) of the matrix, of pre and of ft, raw."""

    def read(reader: Reader) -> Array:
        raw = np.empty(count, RAW[reader.tensor.dtype])
        worker.tick(reader.fill((matrix.begin + start) * raw.itemsize, memoryview(raw.view(np.uint8))))
        return raw

    return read(matrix.sides.read_pre), read(matrix.sides.read_ft)
