"""Prune one tensor: find the exact threshold of its scores, then choose between ft and pre, entry by entry, chunk by chunk.

The tensor is read again instead of held: once for the mean where the score needs it, once for the threshold, once to write.
"""

from __future__ import annotations

import numpy as np

from surgery.checkpoint.dtypes import RAW, Floats
from surgery.checkpoint.tensor import Sink
from surgery.engines import kernels
from surgery.engines.chunks import Sides
from surgery.engines.kernels import Distance
from surgery.engines.results import Result, Sums
from surgery.engines.selection import Search, rank, runs
from surgery.engines.worker import Shifted, Worker
from surgery.methods.actions import Keep, Prune, Reset

SAME = Distance(0.0, 0.0, 0)


def prune_groups(worker: Worker, action: Prune, sides: Sides, sink: Sink) -> Result:
    """Carry out a pruning: each of its groups by itself."""
    if action.groups == 1:
        return prune(worker, action, sides, sink)
    rows = sides.ft.shape[0] // action.groups
    total = Result(0, 0, 0, 0.0, 0.0, 0.0)
    for first in range(0, sides.ft.shape[0], rows):
        group = sides.rows(first, first + rows)
        total += prune(worker, action, group, Shifted(sink, group.ft.start - sides.ft.start))
    return total


def prune(worker: Worker, action: Prune, sides: Sides, sink: Sink) -> Result:
    """Carry out a pruning of one group: ft where the score is above the threshold and below the one at the top, else pre."""
    pre, ft, n = sides.pre, sides.ft, sides.ft.entries
    r, k = rank(action.sparsity, n), rank(action.top, n)
    if r + k in (0, n) or r + k > n:
        return take(worker, Keep() if r + k == 0 else Reset(), sides, sink)
    mean = worker.chunks.mean(sides) if action.uses_mean else np.float32(0)
    limit = threshold(worker, action, mean, r, sides) if r else np.float32(-np.inf)
    ceiling = threshold(worker, action, mean, n - k + 1, sides) if k else None
    sums, kept = Sums(), 0
    for start, base, tuned in worker.chunks.read(sides):
        out = worker.out(tuned)
        cast = worker.cast(base, pre, ft)
        done = kernels.prune(action, mean, limit, pre.dtype, base, cast, ft.dtype, tuned, out, ceiling)
        if pre.dtype == ft.dtype:
            sums.add(done.before, done.kept2, done.changed)
        else:  # what went back was rounded
            after = kernels.distance(pre.dtype, base, ft.dtype, out)
            sums.add(done.before, after.delta2, after.differ)
        kept += done.kept
        sink.write(start * out.itemsize, memoryview(out))
    return sums.result(kept, n - kept)


def threshold(worker: Worker, action: Prune, mean: np.float32, r: int, sides: Sides) -> np.float32:
    """The r-th smallest score, exactly."""
    pre, ft = sides.pre, sides.ft
    search = Search(_sample(worker, action, mean, sides), ft.entries, r)
    while not search.found:
        bracket = search.bracket()
        counts = [
            kernels.count(action, mean, bracket, pre.dtype, base, ft.dtype, tuned)
            for _, base, tuned in worker.chunks.read(sides, backwards=True)
        ]
        search.narrow(
            sum(part.above_low for part in counts),
            sum(part.above_high for part in counts),
            np.concatenate([part.inside for part in counts]),
        )
    return search.threshold


def take(worker: Worker, action: Keep | Reset, sides: Sides, sink: Sink) -> Result:
    """Write one of the two sides."""
    pre, ft, sums = sides.pre, sides.ft, Sums()
    for start, base, tuned in worker.chunks.read(sides):
        before = after = kernels.distance(pre.dtype, base, ft.dtype, tuned)
        if isinstance(action, Reset):
            tuned = worker.cast(base, pre, ft)
            after = SAME if pre.dtype == ft.dtype else kernels.distance(pre.dtype, base, ft.dtype, tuned)
        sums.add(before, after.delta2, after.differ)
        sink.write(start * tuned.itemsize, memoryview(tuned))
    kept = ft.entries if isinstance(action, Keep) else 0
    return sums.result(kept, ft.entries - kept)


def _sample(worker: Worker, action: Prune, mean: np.float32, sides: Sides) -> Floats:
    """Scores of short runs from all over the tensor, [runs, RUN]; of the whole tensor, [1, n], when it is small."""
    pre, ft, n = sides.pre, sides.ft, sides.ft.entries
    starts, length = runs(n)
    raw = []
    for tensor, reader in ((pre, sides.read_pre), (ft, sides.read_ft)):
        sampled = np.empty(len(starts) * length, RAW[tensor.dtype])
        for position, start in enumerate(starts):
            part = sampled[position * length : (position + 1) * length]
            reader.fill(int(start) * sampled.itemsize, memoryview(part.view(np.uint8)))
        raw.append(sampled)
    delta, weight = kernels.task_vector(pre.dtype, raw[0], ft.dtype, raw[1])
    scores: Floats = action.score(delta, weight, mean)
    return scores.reshape(len(starts), length)
