"""Edit one tensor on the CPU, in chunks that fit the cache.

A chunk of pre and ft is read from the page cache into a small buffer, scored, chosen and handed on while it is hot. No tensor
is ever in memory as a whole: pruning reads it again instead, once to find the threshold and once to write, from the
page cache, so that the peak depends on neither the model nor its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import RAW, Array, Floats, narrow, widen
from surgery.checkpoint.tensor import Reader, Sink, Tensor
from surgery.engines import kernels
from surgery.engines.chunks import CHUNK, Chunks, Sides
from surgery.engines.kernels import Distance
from surgery.engines.merge import merge
from surgery.engines.results import Result, Sums
from surgery.engines.rows import prune_rows
from surgery.engines.selection import Search, rank, runs
from surgery.errors import CheckpointError
from surgery.methods.actions import Blend, Keep, Merge, Prune, PruneRows, Reset, Step

COPY_BYTES = 1 << 20
SAME = Distance(0.0, 0.0, 0)


class Shifted:
    """A part of a sink, from a byte on."""

    def __init__(self, sink: Sink, begin: int) -> None:
        self.sink, self.begin = sink, begin

    def write(self, offset: int, data: Any) -> None:
        """Put bytes at an offset from the part's first byte."""
        self.sink.write(self.begin + offset, data)


class CpuEngine:
    """One worker's buffers, and the edit of a tensor with them.

    Args:
        tick: called with the number of bytes that were read; may raise to stop the work.
        allow_nonfinite: let NaN and Inf of an edited tensor pass.
    """

    def __init__(self, tick: Callable[[int], None], *, allow_nonfinite: bool = False) -> None:
        self.tick = tick
        self.allow_nonfinite = allow_nonfinite
        self.chunks = Chunks(tick)
        self.copying = bytearray(COPY_BYTES)
        self.output = bytearray(8 * CHUNK)

    def run(self, step: Step, sink: Sink) -> Result:
        """Carry out a step.

        Raises:
            CheckpointError: a file ends early, or an edited tensor holds NaN or Inf.
        """
        with np.errstate(all="ignore"), step.shared.open() as ft:
            if step.pre is None or not step.ft.is_float:
                finite = self._copy(ft, sink)
                return Result(nonfinite=not finite and not step.place.buffer)
            with step.pre.open() as pre:
                sides = Sides(step.pre, step.shared, pre, ft)
                match step.action:
                    case Prune() as action:
                        result = self._prune_groups(action, sides, sink)
                    case PruneRows() as action:
                        result = prune_rows(self, action, sides, sink)
                    case Blend() as action:
                        result = self._blend(action, sides, sink)
                    case Merge() as action:
                        result = merge(self, action, sides, step.others, sink)
                    case Keep() | Reset() as action:
                        result = self.take(action, sides, sink)
            result = checked(step, result, allow_nonfinite=self.allow_nonfinite)
        return self.add(step, result, sink)

    def add(self, step: Step, result: Result, sink: Sink) -> Result:
        """Copy the rows that only ft has, behind the others."""
        if step.added is None:
            return result
        with step.added.open() as reader:
            finite = self._copy(reader, Shifted(sink, step.added.start - step.ft.start))
        entries = step.added.entries
        return replace(
            result,
            kept=None if result.kept is None else result.kept + entries,
            differ=None if result.differ is None else result.differ + entries,
            nonfinite=result.nonfinite or not finite,
        )

    def _copy(self, reader: Reader, sink: Sink) -> bool:
        """Copy a tensor that has no base; return whether all its numbers are finite."""
        tensor, total = reader.tensor, 0.0
        for start in range(0, tensor.nbytes, COPY_BYTES):
            view = memoryview(self.copying)[: min(COPY_BYTES, tensor.nbytes - start)]
            self.tick(reader.fill(start, view))
            if tensor.is_float:
                total += kernels.abs_sum(tensor.dtype, np.frombuffer(view, RAW[tensor.dtype]))
            sink.write(start, view)
        return bool(np.isfinite(total))

    def take(self, action: Keep | Reset, sides: Sides, sink: Sink) -> Result:
        """Write one of the two sides."""
        pre, ft, sums = sides.pre, sides.ft, Sums()
        for start, base, tuned in self.chunks.read(sides):
            before = after = kernels.distance(pre.dtype, base, ft.dtype, tuned)
            if isinstance(action, Reset):
                tuned = self.cast(base, pre, ft)
                after = SAME if pre.dtype == ft.dtype else kernels.distance(pre.dtype, base, ft.dtype, tuned)
            sums.add(before, after.delta2, after.differ)
            sink.write(start * tuned.itemsize, memoryview(tuned))
        kept = ft.entries if isinstance(action, Keep) else 0
        return sums.result(kept, ft.entries - kept)

    def _blend(self, action: Blend, sides: Sides, sink: Sink) -> Result:
        sums = Sums()
        for start, base, tuned in self.chunks.read(sides):
            out = self.out(tuned)
            before, after = kernels.blend(action.alpha, sides.pre.dtype, base, sides.ft.dtype, tuned, out)
            sums.add(before, after.delta2, after.differ)
            sink.write(start * out.itemsize, memoryview(out))
        return sums.result(None, None)

    def _prune_groups(self, action: Prune, sides: Sides, sink: Sink) -> Result:
        if action.groups == 1:
            return self.prune(action, sides, sink)
        rows = sides.ft.shape[0] // action.groups
        total = Result(0, 0, 0, 0.0, 0.0, 0.0)
        for first in range(0, sides.ft.shape[0], rows):
            group = sides.rows(first, first + rows)
            total += self.prune(action, group, Shifted(sink, group.ft.start - sides.ft.start))
        return total

    def prune(self, action: Prune, sides: Sides, sink: Sink) -> Result:
        """Carry out a pruning of one group: ft where the score is above the threshold, else pre."""
        pre, ft, n = sides.pre, sides.ft, sides.ft.entries
        r = rank(action.sparsity, n)
        if r in (0, n):
            return self.take(Keep() if r == 0 else Reset(), sides, sink)
        mean = self.chunks.mean(sides) if action.uses_mean else np.float32(0)
        threshold = self.threshold(action, mean, r, sides)
        sums, kept = Sums(), 0
        for start, base, tuned in self.chunks.read(sides):
            out = self.out(tuned)
            cast = self.cast(base, pre, ft)
            done = kernels.prune(action, mean, threshold, pre.dtype, base, cast, ft.dtype, tuned, out)
            if pre.dtype == ft.dtype:
                sums.add(done.before, done.kept2, done.changed)
            else:  # what went back was rounded
                after = kernels.distance(pre.dtype, base, ft.dtype, out)
                sums.add(done.before, after.delta2, after.differ)
            kept += done.kept
            sink.write(start * out.itemsize, memoryview(out))
        return sums.result(kept, n - kept)

    def threshold(self, action: Prune, mean: np.float32, r: int, sides: Sides) -> np.float32:
        """The r-th smallest score, exactly."""
        pre, ft = sides.pre, sides.ft
        search = Search(self._sample(action, mean, sides), ft.entries, r)
        while not search.found:
            bracket = search.bracket()
            counts = [
                kernels.count(action, mean, bracket, pre.dtype, base, ft.dtype, tuned)
                for _, base, tuned in self.chunks.read(sides, backwards=True)
            ]
            search.narrow(
                sum(part.above_low for part in counts),
                sum(part.above_high for part in counts),
                np.concatenate([part.inside for part in counts]),
            )
        return search.threshold

    def _sample(self, action: Prune, mean: np.float32, sides: Sides) -> Floats:
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

    def out(self, tuned: Array) -> Array:
        """A chunk to write, of tuned's type and length; the next one overwrites it."""
        return np.frombuffer(self.output, tuned.dtype, len(tuned))

    def cast(self, base: Array, pre: Tensor, ft: Tensor) -> Array:
        """A raw chunk of pre in ft's type.

        Raises:
            CheckpointError: a number does not fit.
        """
        if pre.dtype == ft.dtype:
            return base
        cast = narrow(widen(pre.dtype, base), ft.dtype)
        if not self.allow_nonfinite and not np.isfinite(widen(ft.dtype, cast)).all():
            raise CheckpointError(
                f"{pre.path}: {pre.name} holds NaN, Inf, or a number too large for ft's {ft.dtype}. Repair it, or allow it with "
                "--allow-nonfinite."
            )
        return cast


def checked(step: Step, result: Result, *, allow_nonfinite: bool) -> Result:
    """The result, with a note where NaN or Inf was met.

    Raises:
        CheckpointError: it was met in a tensor that is edited.
    """
    sums = (result.before2 or 0.0) + (result.weight2 or 0.0)
    result.nonfinite = result.nonfinite or not np.isfinite(sums)
    if result.nonfinite and not allow_nonfinite and step.pre and not isinstance(step.action, Keep):
        raise CheckpointError(
            f"{step.ft.name} holds NaN or Inf, in {step.ft.path} or in {step.pre.path}. Repair it, or allow it with "
            "--allow-nonfinite."
        )
    return result
