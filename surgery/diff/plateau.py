"""Between which sparsities a pruning is the same: all entries with Δ = 0 score 0, so that a threshold of 0 stands for many ranks.

    start    the share of entries with S < 0: the sparsity from which on the threshold is 0
    stop     the share with S ≤ 0: the sparsity up to which it is

FAPM's score is negative wherever a weight that moved is smaller than the tensor's mean |W_pre|, and positive where it is larger.
In between lie the entries with Δ = 0, of which there are many in bfloat16: at every sparsity between the two shares, what is kept
is what has a positive score. For |Δ| and |Δ| / |W_pre| no score is negative, and the first share is 0.

A tensor of at most 2^17 entries is counted in full. Of a larger one 128 runs of 512 entries from all over are read, and the mean
is theirs, so that the shares are good to about one hundredth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import RAW, Array
from surgery.checkpoint.tensor import Reader
from surgery.engines import kernels
from surgery.engines.chunks import Sides
from surgery.engines.kernels import Counts
from surgery.engines.selection import runs
from surgery.methods.actions import Prune, Score, Step

# Of the runs that a search for a threshold would sample, so many: a share is no threshold.
RUNS = 128


@dataclass(frozen=True, slots=True)
class Plateau:
    """The shares of entries with S < 0 and with S ≤ 0, and how many entries they are of."""

    start: float
    stop: float
    entries: int


def plateau(sides: Sides, score: Score) -> Plateau | None:
    """Measure a tensor; None where it has no entries.

    Raises:
        CheckpointError: a file ends early or cannot be read.
    """
    pre, ft = sides.pre, sides.ft
    if not ft.entries:
        return None
    starts, length = runs(ft.entries)
    starts = starts[:: max(len(starts) // RUNS, 1)]
    base, tuned = (
        _sample(reader, RAW[tensor.dtype], starts, length)
        for tensor, reader in ((pre, sides.read_pre), (ft, sides.read_ft))
    )
    with np.errstate(all="ignore"):
        delta, weight = kernels.task_vector(pre.dtype, base, ft.dtype, tuned)
        found = score(delta, weight, np.float32(np.mean(weight, dtype=np.float64)))
        return Plateau(float(np.mean(found < 0)), float(np.mean(found <= 0)), ft.entries)


def planned(steps: Iterable[Step]) -> Plateau | None:
    """Measure what a planned edit prunes from its low end; None where it prunes nothing so.

    Raises:
        CheckpointError: a file ends early or cannot be read.
    """
    found = []
    for step in steps:
        if isinstance(step.action, Prune) and not step.action.top and step.pre is not None:
            with step.pre.open() as pre, step.shared.open() as ft:
                found.append(plateau(Sides(step.pre, step.shared, pre, ft), step.action.score))
    return mean(found)


def mean(parts: Iterable[Plateau | None]) -> Plateau | None:
    """The shares of all entries of some tensors; None where there are none."""
    known = [part for part in parts if part]
    entries = sum(part.entries for part in known)
    if not entries:
        return None
    start, stop = (sum(getattr(part, name) * part.entries for part in known) / entries for name in ("start", "stop"))
    return Plateau(start, stop, entries)


def _sample(reader: Reader, dtype: np.dtype[Any], starts: Counts, length: int) -> Array:
    found = np.empty(len(starts) * length, dtype)
    for number, start in enumerate(starts):
        run = found[number * length : (number + 1) * length]
        reader.fill(int(start) * found.itemsize, memoryview(run.view(np.uint8)))
    return found
