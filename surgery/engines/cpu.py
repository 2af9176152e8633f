"""Edit one tensor on the CPU, in chunks that fit the cache.

A chunk of pre and ft is read from the page cache into a small buffer, scored, chosen and handed on while it is hot. No tensor
is ever in memory as a whole: pruning reads it again instead, once to find the threshold and once to write, from the
page cache, so that the peak depends on neither the model nor its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from surgery.checkpoint.dtypes import RAW
from surgery.checkpoint.tensor import Reader, Sink
from surgery.engines import kernels
from surgery.engines.chunks import Sides
from surgery.engines.merge import merge
from surgery.engines.prune import prune_groups, take
from surgery.engines.results import Result, Sums
from surgery.engines.rows import prune_rows
from surgery.engines.salient import keep_salient
from surgery.engines.spectral import Algebra, OnProcessor, shrink, soften
from surgery.engines.worker import Shifted, Worker, checked
from surgery.methods.actions import Blend, Keep, KeepSalient, Merge, Prune, PruneRows, Reset, Shrink, Soften, Step

COPY_BYTES = 1 << 20


class CpuEngine:
    """One worker's buffers, and the edit of a tensor with them.

    Args:
        tick: called with the number of bytes that were read; may raise to stop the work.
        allow_nonfinite: let NaN and Inf of an edited tensor pass.
        algebra: where matrices are decomposed; by default on the processor.
    """

    def __init__(
        self, tick: Callable[[int], None], *, allow_nonfinite: bool = False, algebra: Algebra | None = None
    ) -> None:
        self.worker = Worker(tick, allow_nonfinite=allow_nonfinite)
        self.algebra = algebra or OnProcessor()
        self.copying = bytearray(COPY_BYTES)

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
                        result = prune_groups(self.worker, action, sides, sink)
                    case PruneRows() as action:
                        result = prune_rows(self.worker, action, sides, sink)
                    case KeepSalient() as action:
                        result = keep_salient(self.worker, action, sides, sink)
                    case Shrink() as action:
                        result = shrink(self.worker, action, sides, sink, self.algebra)
                    case Soften() as action:
                        result = soften(self.worker, action, sides, sink, self.algebra)
                    case Blend() as action:
                        result = self._blend(action, sides, sink)
                    case Merge() as action:
                        result = merge(self.worker, action, sides, step.others, sink)
                    case Keep() | Reset() as action:
                        result = take(self.worker, action, sides, sink)
            result = checked(step, result, allow_nonfinite=self.worker.allow_nonfinite)
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
            self.worker.tick(reader.fill(start, view))
            if tensor.is_float:
                total += kernels.abs_sum(tensor.dtype, np.frombuffer(view, RAW[tensor.dtype]))
            sink.write(start, view)
        return bool(np.isfinite(total))

    def _blend(self, action: Blend, sides: Sides, sink: Sink) -> Result:
        sums = Sums()
        for start, base, tuned in self.worker.chunks.read(sides):
            out = self.worker.out(tuned)
            before, after = kernels.blend(action.alpha, sides.pre.dtype, base, sides.ft.dtype, tuned, out)
            sums.add(before, after.delta2, after.differ)
            sink.write(start * out.itemsize, memoryview(out))
        return sums.result(None, None)
