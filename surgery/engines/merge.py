"""Merge the task vectors of several fine-tuned models into one tensor, chunk by chunk.

First the threshold of each model, as in a pruning; then one pass in which every side is read once. Only the entries that some
model keeps are widened, merged and rounded; the others are the bits of pre. Memory: one more chunk for each further model.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from functools import partial, reduce

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Array, narrow, widen
from surgery.checkpoint.tensor import Sink, Tensor
from surgery.engines import kernels
from surgery.engines.chunks import CHUNK, Sides
from surgery.engines.kernels import Distance
from surgery.engines.prune import prune, threshold
from surgery.engines.results import Result, Sums
from surgery.engines.selection import rank
from surgery.engines.worker import Worker
from surgery.errors import CheckpointError
from surgery.methods.actions import Merge, Prune
from surgery.methods.ties import masked

Bools = NDArray[np.bool_]
# (start, raw pre, raw ft) of a chunk -> which entries the model keeps, bool, and how far it is from pre.
Keeps = Callable[[int, Array, Array], tuple[Bools, Distance]]


def merge(worker: Worker, action: Merge, sides: Sides, others: tuple[Tensor, ...], sink: Sink) -> Result:
    """Write pre + scale · combine(τ̂_0, τ̂_1, …) of one tensor.

    Args:
        sides: pre and the first model's tensor.
        others: the further models', of the same shape.

    Returns:
        pruned counts the entries that are pre's because the merged task vector is 0 there; before2 is the first model's.

    Raises:
        CheckpointError: a file ends early, an input holds NaN or Inf, or a sum is too large for ft's type.
    """
    if isinstance(action.keeps, Prune) and action.scale == 1 and not others:
        return prune(worker, action.keeps, sides, sink)
    with contextlib.ExitStack() as opened:
        models = [sides]
        for other in others:
            models.append(Sides(sides.pre, other, sides.read_pre, opened.enter_context(other.open())))
        keeps = [_keeps(worker, action, number, sides.ft.name, model) for number, model in enumerate(models)]
        return _merge(worker, action, models, keeps, sink)


def _merge(worker: Worker, action: Merge, models: list[Sides], keeps: list[Keeps], sink: Sink) -> Result:
    pre, ft = models[0].pre, models[0].ft
    word = np.dtype(f"u{RAW[ft.dtype].itemsize}")
    sums, moved, finite = Sums(), 0, True
    buffers = [np.empty(min(CHUNK, ft.entries), RAW[model.ft.dtype]) for model in models[1:]]
    for start, base, tuned in worker.chunks.read(models[0]):
        raw = [tuned]
        for model, buffer in zip(models[1:], buffers, strict=True):
            raw.append(buffer[: len(tuned)])
            worker.tick(model.read_ft.fill(start * buffer.itemsize, memoryview(raw[-1].view(np.uint8))))
        kept, distances = zip(*(keep(start, base, chunk) for keep, chunk in zip(keeps, raw, strict=True)), strict=True)
        finite &= all(_finite(worker, model, distance) for model, distance in zip(models, distances, strict=True))
        at = np.flatnonzero(reduce(operator.or_, kept))
        changed, values = _values(
            action, models, base[at], [(chunk[at], part[at]) for chunk, part in zip(raw, kept, strict=True)]
        )
        if not worker.allow_nonfinite and not np.isfinite(widen(ft.dtype, values)).all():
            raise CheckpointError(
                f"{ft.name} of {ft.path} becomes too large for {ft.dtype} when it is merged. Lower `lam`, or allow it with "
                "`allow_nonfinite`."
            )
        # Through integers, since a float copy may quieten a NaN's bits.
        out = worker.out(tuned)
        out.view(word)[:] = worker.cast(base, pre, ft).view(word)
        out.view(word)[at[changed]] = values.view(word)
        after = kernels.distance(pre.dtype, base, ft.dtype, out)
        sums.add(distances[0], after.delta2, after.differ)
        moved += len(values)
        sink.write(start * out.itemsize, memoryview(out))
    result = sums.result(None, ft.entries - moved)
    result.nonfinite = not finite
    return result


def _values(action: Merge, models: list[Sides], base: Array, tuned: list[tuple[Array, Bools]]) -> tuple[Bools, Array]:
    """Which of some entries the merged task vector changes, and to what: raw, in the first model's type.

    Args:
        base: raw pre.
        tuned: raw ft of each model, and whether the model keeps the entry.
    """
    dtype = models[0].ft.dtype
    wide = widen(models[0].pre.dtype, base)
    vectors = []
    for model, (raw, kept) in zip(models, tuned, strict=True):
        vector = (widen(model.ft.dtype, raw) - wide).astype(np.float32)
        vectors.append(masked(vector, kept))
    merged, parts = action.combine(vectors)
    step = np.float32(action.scale) * merged
    values = narrow(wide + step, dtype)
    if action.scale == 1:
        alone = sum(part.astype(np.uint16) for part in parts) == 1
        for model, (raw, _), part in zip(models, tuned, parts, strict=True):
            same = raw if model.ft.dtype == dtype else narrow(widen(model.ft.dtype, raw), dtype)
            words = values.view(f"u{values.itemsize}")
            words ^= (words ^ same.view(words.dtype)) * (part & alone)
    changed = step != 0
    return changed, values[changed]


def _keeps(worker: Worker, action: Merge, number: int, name: str, model: Sides) -> Keeps:
    """How to tell which entries of a model are kept; finds the threshold."""
    pre, ft, keeps = model.pre, model.ft, action.keeps
    if isinstance(keeps, Prune):
        r = rank(keeps.sparsity, ft.entries)
        ends = {0: np.float32(0), ft.entries: np.float32(np.inf)}
        limit = ends[r] if r in ends else threshold(worker, keeps, np.float32(0), r, model)
        return partial(_above, keeps, limit, pre.dtype, ft.dtype)

    def drawn(start: int, base: Array, tuned: Array) -> tuple[Bools, Distance]:
        return keeps(name, number, start, len(tuned)), kernels.distance(pre.dtype, base, ft.dtype, tuned)

    return drawn


def _above(
    trim: Prune, limit: np.float32, pre_dtype: str, ft_dtype: str, start: int, base: Array, tuned: Array
) -> tuple[Bools, Distance]:
    words = tuned.view(f"u{tuned.itemsize}")
    # A pruning chooses between two words: with ft's complement for the other, what equals ft was kept.
    other, out = np.invert(words).view(tuned.dtype), np.empty_like(tuned)
    done = kernels.prune(trim, np.float32(0), limit, pre_dtype, base, other, ft_dtype, tuned, out)
    return out.view(words.dtype) == words, done.before


def _finite(worker: Worker, model: Sides, distance: Distance) -> bool:
    finite = bool(np.isfinite(distance.delta2 + distance.weight2))
    if not finite and not worker.allow_nonfinite:
        raise CheckpointError(
            f"{model.ft.name} holds NaN or Inf, in {model.ft.path} or in {model.pre.path}. Repair it, or allow it with "
            "`allow_nonfinite`."
        )
    return finite
