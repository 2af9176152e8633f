"""The inner loops of the streaming edit on a CPU: a chunk of pre and ft in, sums and the output's bits out.

Every function here is plain numpy and is the definition. Where its C twin in `kernels.c` was compiled at installation, that is
called instead: the same bits in one pass over the chunk, with the interpreter lock released. A test holds the two against each
other.

Arrays are one-dimensional chunks of n entries. A raw chunk keeps the stored bits: bfloat16, which numpy lacks, as uint16,
other types as themselves. A dtype is the name that safetensors gives it: "BF16", "F16", "F32" or "F64".
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.actions import Prune
from surgery.methods import hma

Array = NDArray[Any]
Floats = NDArray[np.float32]

RAW: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


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
    """What `prune` did with a chunk: the distance of ft from pre, ΣΔ² over the kept entries, how many of these have Δ ≠ 0, and
    how many there are.
    """

    before: Distance
    kept2: float
    changed: int
    kept: int


def widen(dtype: str, raw: Array) -> Array:
    """The chunk's values as float32, exactly (float64 for "F64")."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64 if dtype == "F64" else np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """Values (float32 or float64) rounded to the nearest stored value of dtype, ties to even: a raw chunk."""
    if dtype != "BF16":
        return values.astype(RAW[dtype])
    values = values.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def abs_sum(dtype: str, raw: Array) -> float:
    """Σ|x|, accumulated in float64."""
    if native and dtype in native.dtypes:
        return float(native.library.abs_sum(native.dtypes[dtype], raw.ctypes.data, len(raw)))
    return float(np.sum(np.abs(widen(dtype, raw)), dtype=np.float64))


def task_vector(pre_dtype: str, pre: Array, ft_dtype: str, ft: Array) -> tuple[Floats, Floats]:
    """(|Δ|, |W_pre|), float32: Δ = ft − pre is rounded once, from exactly upcast inputs (METHODS, Notation)."""
    delta, base = _difference(pre_dtype, pre, ft_dtype, ft)
    return np.abs(delta), np.abs(base)


def distance(pre_dtype: str, pre: Array, dtype: str, x: Array) -> Distance:
    """The distance of x from pre: float32 differences, float64 sums."""
    if native and {pre_dtype, dtype} <= native.dtypes.keys():
        out = _Distance()
        native.library.distance(
            native.dtypes[pre_dtype], pre.ctypes.data, native.dtypes[dtype], x.ctypes.data, len(pre), ctypes.byref(out)
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
    if native and action.kernel in native.scores and {pre_dtype, ft_dtype} <= native.dtypes.keys():
        inside, result = np.empty(len(pre) if collect else 0, np.float32), _Counted()
        native.library.count(
            *(native.scores[action.kernel], mean, low, high),
            *(native.dtypes[pre_dtype], pre.ctypes.data, native.dtypes[ft_dtype], ft.ctypes.data, len(pre)),
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
) -> Pruned:
    """Score a chunk and write ft where the score is above the threshold, else pre, into out.

    Args:
        mean: mean |W_pre| of the whole tensor.
        pre, base: raw pre in its own type, and in ft's.
        ft, out: raw, in ft's type.
    """
    if native and action.kernel in native.scores and {pre_dtype, ft_dtype} <= native.dtypes.keys():
        result = _Pruned()
        function = native.library.prune16 if out.itemsize == 2 else native.library.prune32
        function(
            *(
                native.scores[action.kernel],
                mean,
                threshold,
                native.dtypes[pre_dtype],
                pre.ctypes.data,
                base.ctypes.data,
            ),
            *(native.dtypes[ft_dtype], ft.ctypes.data, len(pre), out.ctypes.data, ctypes.byref(result)),
        )
        return Pruned(result.before.read(), result.kept2, result.changed, result.kept)
    difference, weight = _difference(pre_dtype, pre, ft_dtype, ft)
    keep = action.score(np.abs(difference), np.abs(weight), mean) > threshold
    # Through integers, since a float copy may quieten a NaN's bits.
    word = np.dtype(f"u{out.itemsize}")
    out.view(word)[:] = np.where(keep, ft.view(word), base.view(word))
    kept = difference[keep]
    return Pruned(
        _measure(difference, weight), sum_of_squares(kept), int(np.count_nonzero(kept)), int(np.count_nonzero(keep))
    )


def blend(alpha: float, pre_dtype: str, pre: Array, ft_dtype: str, ft: Array, out: Array) -> tuple[Distance, Distance]:
    """Write alpha · pre + (1 − alpha) · ft into out, raw in ft's type; return the distances of ft and of out from pre."""
    if native and ft_dtype in ("BF16", "F32") and pre_dtype in native.dtypes:
        before, after = _Distance(), _Distance()
        native.library.blend(
            *(alpha, 1 - alpha, native.dtypes[pre_dtype], pre.ctypes.data, native.dtypes[ft_dtype], ft.ctypes.data),
            *(len(pre), out.ctypes.data, ctypes.byref(before), ctypes.byref(after)),
        )
        return before.read(), after.read()
    out[:] = narrow(hma.blend(widen(pre_dtype, pre), widen(ft_dtype, ft), alpha), ft_dtype)
    return distance(pre_dtype, pre, ft_dtype, ft), distance(pre_dtype, pre, ft_dtype, out)


def sum_of_squares(values: Array) -> float:
    """Σx² in float64. Not a dot product: the BLAS library would start threads of its own, which spin."""
    return float(np.sum(np.square(values, dtype=np.float64)))


def _difference(pre_dtype: str, pre: Array, dtype: str, x: Array) -> tuple[Array, Array]:
    base = widen(pre_dtype, pre)
    return (widen(dtype, x) - base).astype(np.float32), base.astype(np.float32)


def _measure(difference: Array, base: Array) -> Distance:
    return Distance(sum_of_squares(difference), sum_of_squares(base), int(np.count_nonzero(difference)))


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


class Native:
    """The compiled kernels, and the types and scores that they know."""

    dtypes: ClassVar = {"BF16": 0, "F16": 1, "F32": 2}
    scores: ClassVar = {"fapm": 0, "magnitude": 1}

    def __init__(self, path: Path) -> None:
        pointer, size, code, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
        self.library = ctypes.CDLL(str(path))
        self.library.abs_sum.argtypes = [code, pointer, size]
        self.library.abs_sum.restype = ctypes.c_double
        self.library.distance.argtypes = [code, pointer, code, pointer, size, pointer]
        self.library.blend.argtypes = [number, number, code, pointer, code, pointer, size, pointer, pointer, pointer]
        self.library.count.argtypes = [
            code,
            number,
            number,
            number,
            code,
            pointer,
            code,
            pointer,
            size,
            pointer,
            pointer,
        ]
        for prune_words in (self.library.prune16, self.library.prune32):
            prune_words.argtypes = [code, number, number, code, pointer, pointer, code, pointer, size, pointer, pointer]


def _load() -> Native | None:
    if os.environ.get("SURGERY_KERNELS") == "numpy":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernels" + suffix)
        if path.exists():
            return Native(path)
    return None


native = _load()
