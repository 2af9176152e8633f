"""The inner loops of the streaming edit on a CPU: a chunk of pre and ft in, sums and the output's bits out.

Every function here is plain numpy and is the definition. Where its C twin in `kernels.c` was compiled at installation, that is
called instead: the same bits in one pass over the chunk, with the interpreter lock released. A test holds the two against each
other.

Arrays are one-dimensional chunks of n entries. A raw chunk keeps the stored bits: bfloat16, which numpy lacks, as uint16,
other types as themselves. A dtype is the name that safetensors gives it: "BF16", "F16", "F32" or "F64".
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery import native
from surgery.checkpoint.dtypes import Array, Floats, narrow, widen
from surgery.methods import hma, relative
from surgery.methods.actions import Prune

Counts = NDArray[np.int64]

# Bins of a histogram of float32 magnitudes by their upper 15 bits: 128 to each power of two.
BINS = 1 << 15


@dataclass(frozen=True, slots=True)
class Distance:
    """How far x is from pre: Σ(x − pre)², Σpre² and the number of entries that differ."""

    delta2: float
    weight2: float
    differ: int


@dataclass(frozen=True, slots=True)
class Counted:
    """How many scores of a chunk are above each end of a bracket, and the scores inside it (float32)."""

    above_low: int
    above_high: int
    inside: Floats


@dataclass(frozen=True, slots=True)
class Pruned:
    """Results of `prune` on a chunk: the distance of ft from pre, ΣΔ² over the kept entries, how many of these have Δ ≠ 0, and
    how many there are.
    """

    before: Distance
    kept2: float
    changed: int
    kept: int


@dataclass(frozen=True, slots=True)
class Compared:
    """How a chunk of ft differs from pre.

    Attributes:
        delta2, weight2: ΣΔ² and ΣW_pre².
        same: entries whose bits are equal, or whose values are where the types differ.
        infinite: entries whose ratio |Δ| / |W_pre| is infinite.
        max_delta, max_ratio: the largest finite |Δ| and ratio.
    """

    delta2: float
    weight2: float
    same: int
    infinite: int
    max_delta: float
    max_ratio: float


def abs_sum(dtype: str, raw: Array) -> float:
    """Σ|x|, accumulated in float64."""
    if (compiled := native.compiled) and dtype in compiled.dtypes:
        return float(compiled.library.abs_sum(compiled.dtypes[dtype], raw.ctypes.data, len(raw)))
    return float(np.sum(np.abs(widen(dtype, raw)), dtype=np.float64))


def task_vector(pre_dtype: str, pre: Array, ft_dtype: str, ft: Array) -> tuple[Floats, Floats]:
    """(|Δ|, |W_pre|), float32: Δ = ft − pre is rounded once, from exactly upcast inputs (METHODS, Notation)."""
    delta, base = _difference(pre_dtype, pre, ft_dtype, ft)
    return np.abs(delta), np.abs(base)


def distance(pre_dtype: str, pre: Array, dtype: str, x: Array) -> Distance:
    """The distance of x from pre: float32 differences, float64 sums."""
    if (compiled := native.compiled) and {pre_dtype, dtype} <= compiled.dtypes.keys():
        out = _Distance()
        compiled.library.distance(
            compiled.dtypes[pre_dtype],
            pre.ctypes.data,
            compiled.dtypes[dtype],
            x.ctypes.data,
            len(pre),
            ctypes.byref(out),
        )
        return out.read()
    return _measure(*_difference(pre_dtype, pre, dtype, x))


def count(
    action: Prune,
    mean: np.float32,
    bracket: tuple[np.float32, np.float32, bool],
    pre_dtype: str,
    pre: Array,
    ft_dtype: str,
    ft: Array,
) -> Counted:
    """Score a chunk, count, and collect the scores in (low, high]. A score that is NaN is above nothing.

    Args:
        mean: mean |W_pre| of the whole tensor.
        bracket: low, high, and whether to collect.
    """
    low, high, collect = bracket
    if (
        (compiled := native.compiled)
        and action.kernel in compiled.scores
        and {pre_dtype, ft_dtype} <= compiled.dtypes.keys()
    ):
        inside, result = np.empty(len(pre) if collect else 0, np.float32), _Counted()
        compiled.library.count(
            *(compiled.scores[action.kernel], mean, low, high),
            *(
                compiled.dtypes[pre_dtype],
                pre.ctypes.data,
                compiled.dtypes[ft_dtype],
                ft.ctypes.data,
                len(pre),
            ),
            *(inside.ctypes.data if collect else None, ctypes.byref(result)),
        )
        return Counted(result.above_low, result.above_high, inside[: result.collected].copy())
    score = action.score(*task_vector(pre_dtype, pre, ft_dtype, ft), mean)
    above_low, above_high = score > low, score > high
    inside = score[above_low ^ above_high] if collect else score[:0]
    return Counted(int(np.count_nonzero(above_low)), int(np.count_nonzero(above_high)), inside)


def prune(
    action: Prune,
    mean: np.float32,
    threshold: np.float32,
    pre_dtype: str,
    pre: Array,
    base: Array,
    ft_dtype: str,
    ft: Array,
    out: Array,
    ceiling: np.float32 | None = None,
) -> Pruned:
    """Score a chunk and write ft where the score is above the threshold, else pre, into out.

    Args:
        mean: mean |W_pre| of the whole tensor.
        pre, base: raw pre in its own type, and in ft's.
        ft, out: raw, in ft's type.
        ceiling: where the score is at or above it, pre is written too.
    """
    if (
        (compiled := native.compiled)
        and ceiling is None
        and action.kernel in compiled.scores
        and {pre_dtype, ft_dtype} <= compiled.dtypes.keys()
    ):
        result = _Pruned()
        function = compiled.library.prune16 if out.itemsize == 2 else compiled.library.prune32
        function(
            *(
                compiled.scores[action.kernel],
                mean,
                threshold,
                compiled.dtypes[pre_dtype],
                pre.ctypes.data,
                base.ctypes.data,
            ),
            *(compiled.dtypes[ft_dtype], ft.ctypes.data, len(pre), out.ctypes.data, ctypes.byref(result)),
        )
        return Pruned(result.before.read(), result.kept2, result.changed, result.kept)
    difference, weight = _difference(pre_dtype, pre, ft_dtype, ft)
    score = action.score(np.abs(difference), np.abs(weight), mean)
    keep = score > threshold
    if ceiling is not None:
        keep &= ~(score >= ceiling)
    # Through integers, since a float copy may quieten a NaN's bits.
    word = np.dtype(f"u{out.itemsize}")
    out.view(word)[:] = np.where(keep, ft.view(word), base.view(word))
    kept = difference[keep]
    return Pruned(
        _measure(difference, weight), sum_of_squares(kept), int(np.count_nonzero(kept)), int(np.count_nonzero(keep))
    )


def blend(alpha: float, pre_dtype: str, pre: Array, ft_dtype: str, ft: Array, out: Array) -> tuple[Distance, Distance]:
    """Write alpha · pre + (1 − alpha) · ft into out, raw in ft's type; return the distances of ft and of out from pre."""
    if (compiled := native.compiled) and ft_dtype in ("BF16", "F32") and pre_dtype in compiled.dtypes:
        before, after = _Distance(), _Distance()
        compiled.library.blend(
            *(
                alpha,
                1 - alpha,
                compiled.dtypes[pre_dtype],
                pre.ctypes.data,
                compiled.dtypes[ft_dtype],
                ft.ctypes.data,
            ),
            *(len(pre), out.ctypes.data, ctypes.byref(before), ctypes.byref(after)),
        )
        return before.read(), after.read()
    out[:] = narrow(hma.blend(widen(pre_dtype, pre), widen(ft_dtype, ft), alpha), ft_dtype)
    return distance(pre_dtype, pre, ft_dtype, ft), distance(pre_dtype, pre, ft_dtype, out)


def compare(
    pre_dtype: str,
    pre: Array,
    ft_dtype: str,
    ft: Array,
    sample: tuple[int, int],
    bins: tuple[Counts, Counts],
) -> Compared:
    """Measure what a chunk has become, and add a sample of it to two histograms.

    Args:
        sample: the chunk's first entry in its tensor, a multiple of 256, and the shift s: of each stretch of 2^s entries, s from
            0 to 8, one is drawn, by a hash of the stretch's number in the tensor.
        bins: of |Δ| and of |Δ| / |W_pre| (0 where Δ = 0), int64 [BINS], by the upper half of a float32's magnitude; added to.
    """
    start, shift = sample
    if (compiled := native.compiled) and {pre_dtype, ft_dtype} <= compiled.dtypes.keys():
        result = _Compared()
        compiled.library.compare(
            *(
                compiled.dtypes[pre_dtype],
                pre.ctypes.data,
                compiled.dtypes[ft_dtype],
                ft.ctypes.data,
                len(pre),
                start,
                shift,
            ),
            *(bins[0].ctypes.data, bins[1].ctypes.data, ctypes.byref(result)),
        )
        return Compared(*(getattr(result, field[0]) for field in _Compared._fields_))
    if pre_dtype == ft_dtype:
        word = np.dtype(f"u{pre.itemsize}")
        same = np.count_nonzero(pre.view(word) == ft.view(word))
    else:
        same = np.count_nonzero(widen(pre_dtype, pre) == widen(ft_dtype, ft))
    difference, base = _difference(pre_dtype, pre, ft_dtype, ft)
    delta, weight = np.abs(difference), np.abs(base)
    ratio = relative.score(delta, weight)
    drawn = _draw(start, shift, len(pre))
    for counts, values in zip(bins, (delta, ratio), strict=True):
        counts += np.bincount(values[drawn].view(np.uint32) >> 16 & 0x7FFF, minlength=BINS)
    infinite = int(np.count_nonzero(np.isinf(ratio)))
    squares = sum_of_squares(difference), sum_of_squares(base)
    return Compared(*squares, int(same), infinite, _largest(delta), _largest(ratio))


def sum_of_squares(values: Array) -> float:
    """Σx² in float64. Not a dot product: the BLAS library would start threads of its own, which spin."""
    return float(np.sum(np.square(values, dtype=np.float64)))


def _difference(pre_dtype: str, pre: Array, dtype: str, x: Array) -> tuple[Array, Array]:
    base = widen(pre_dtype, pre)
    return (widen(dtype, x) - base).astype(np.float32), base.astype(np.float32)


def _measure(difference: Array, base: Array) -> Distance:
    return Distance(sum_of_squares(difference), sum_of_squares(base), int(np.count_nonzero(difference)))


def _largest(values: Floats) -> float:
    return float(np.max(values, where=np.isfinite(values), initial=0))


def _draw(start: int, shift: int, n: int) -> NDArray[np.uint64]:
    """One entry of each stretch: positions in a chunk of n. The last stretch may be cut off before its entry."""
    first = np.arange(0, n, 1 << shift, dtype=np.uint64)
    mixed = (((first + np.uint64(start)) >> np.uint64(shift)) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    drawn: NDArray[np.uint64] = first + ((mixed ^ mixed >> np.uint64(31)) & np.uint64((1 << shift) - 1))
    return drawn[drawn < n]


class _Distance(ctypes.Structure):
    _fields_ = [("delta2", ctypes.c_double), ("weight2", ctypes.c_double), ("differ", ctypes.c_int64)]

    def read(self) -> Distance:
        return Distance(self.delta2, self.weight2, self.differ)


class _Counted(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("above_low", "above_high", "collected")]


class _Pruned(ctypes.Structure):
    _fields_ = [
        ("before", _Distance),
        ("kept2", ctypes.c_double),
        ("changed", ctypes.c_int64),
        ("kept", ctypes.c_int64),
    ]


class _Compared(ctypes.Structure):
    _fields_ = [
        ("delta2", ctypes.c_double),
        ("weight2", ctypes.c_double),
        ("same", ctypes.c_int64),
        ("infinite", ctypes.c_int64),
        ("max_delta", ctypes.c_float),
        ("max_ratio", ctypes.c_float),
    ]
