"""Measure in one pass how far the tensors of a pair are apart, as lines of a report: distances from pre, and checksums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from surgery.checkpoint.checksum import Checksum, checksum_of
from surgery.checkpoint.item import Item
from surgery.editing.report import describe
from surgery.engines import kernels
from surgery.engines.chunks import Chunks, Sides
from surgery.engines.results import Result
from surgery.engines.stream import Tick, stream, workers
from surgery.methods.actions import Keep, Step


def moved(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return a line of the report for each tensor; its action is "unchanged" if every value is pre's, else "trained".

    Raises:
        CheckpointError: a file cannot be read.
    """
    steps = [Step(item.ft, item.pre, item.place, Keep()) for item in items]
    found = dict[str, Result]()

    def work(tick: Tick) -> Callable[[Step], None]:
        chunks = Chunks(tick)

        def one(step: Step) -> None:
            found[step.ft.name] = _result(step, chunks)

        return one

    stream(sorted(steps, key=lambda step: -step.ft.nbytes), work, workers(None), lambda _: None)
    lines = []
    for step in steps:
        line = describe(step, found[step.ft.name])
        lines.append(line | {"action": "unchanged" if line["differ"] == 0 else "trained"})
    return lines


def _result(step: Step, chunks: Chunks) -> Result:
    """Return the checksum of a tensor, and its distance from its base if it has one; rows that only ft has count as different."""
    pre, ft, added = step.pre, step.shared, step.added
    if pre is None or not ft.is_float:
        return Result(checksum=checksum_of(ft, chunks.tick))
    checksum, parts = Checksum(), []
    with pre.open() as base, ft.open() as tuned:
        for start, old, new in chunks.read(Sides(pre, ft, base, tuned)):
            checksum.add(start * new.itemsize, new)
            parts.append(kernels.distance(pre.dtype, old, ft.dtype, new))
    delta2, weight2 = math.fsum(part.delta2 for part in parts), math.fsum(part.weight2 for part in parts)
    return Result(
        differ=sum(part.differ for part in parts) + (added.entries if added else 0),
        before2=0.0,
        after2=delta2,
        weight2=weight2,
        nonfinite=not math.isfinite(delta2 + weight2),
        checksum=checksum_of(step.ft, chunks.tick) if added else checksum.text(),
    )
