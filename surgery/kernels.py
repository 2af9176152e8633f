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
class Pruned:
    """What `prune` did with a chunk.

    before is the distance of ft from pre, kept2 ΣΔ² over the kept entries, changed the number of kept entries with Δ ≠ 0.
    above_low and above_high count the scores above each end of the bracket; where (integers) and inside (float32) are the
    places and values of the scores in it.
    """

    before: Distance
    kept2: float
    changed: int
    above_low: int
    above_high: int
    where: Array
    inside: Floats


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


def prune(
    action: Prune,
    mean: np.float32,
    bracket: tuple[np.float32, np.float32, bool],
    pre_dtype: str,
    pre: Array,
    base: Array,
    ft_dtype: str,
    ft: Array,
    out: Array,
) -> Pruned:
    """Score a chunk and write ft where score > high, else pre, into out.

    Whether an entry whose score lies in (low, high] is kept is settled later, when the threshold is known: with collect, such
    entries are returned. A score that is NaN is above nothing, so its entry is pruned first.

    Args:
        mean: mean |W_pre| of the whole tensor.
        bracket: low, high, collect.
        pre, base: raw pre in its own type, and in ft's.
        ft, out: raw, in ft's type.
    """
    low, high, collect = bracket
    if native and action.kernel in native.scores and {pre_dtype, ft_dtype} <= native.dtypes.keys():
        return native.prune(action.kernel, mean, bracket, pre_dtype, pre, base, ft_dtype, ft, out)
    difference, weight = _difference(pre_dtype, pre, ft_dtype, ft)
    delta = np.abs(difference)
    score = action.score(delta, np.abs(weight), mean)
    keep, above = score > high, score > low
    # Through integers, since a float copy may quieten a NaN's bits.
    word = np.dtype(f"u{out.itemsize}")
    out.view(word)[:] = np.where(keep, ft.view(word), base.view(word))
    where = np.flatnonzero(above ^ keep) if collect else np.empty(0, np.intp)
    return Pruned(
        _measure(difference, weight),
        sum_of_squares(delta[keep]),
        int(np.count_nonzero(delta[keep])),
        int(np.count_nonzero(above)),
        int(np.count_nonzero(keep)),
        where,
        score[where],
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


class _Pruned(ctypes.Structure):
    _fields_ = [
        ("before", _Distance),
        ("kept2", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("changed", "above_low", "above_high", "collected")),
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
        for function in (self.library.prune16, self.library.prune32):
            function.argtypes = [
                *(code, number, number, number, code, pointer, pointer),
                *(code, pointer, size, pointer, pointer, pointer, pointer),
            ]

    def prune(
        self,
        score: str,
        mean: np.float32,
        bracket: tuple[np.float32, np.float32, bool],
        pre_dtype: str,
        pre: Array,
        base: Array,
        ft_dtype: str,
        ft: Array,
        out: Array,
    ) -> Pruned:
        low, high, collect = bracket
        room = len(pre) if collect else 0
        where, inside, result = np.empty(room, np.uint32), np.empty(room, np.float32), _Pruned()
        function = self.library.prune16 if out.itemsize == 2 else self.library.prune32
        function(
            *(self.scores[score], mean, low, high, self.dtypes[pre_dtype], pre.ctypes.data, base.ctypes.data),
            *(self.dtypes[ft_dtype], ft.ctypes.data, len(pre), out.ctypes.data),
            *((where.ctypes.data, inside.ctypes.data) if collect else (None, None)),
            ctypes.byref(result),
        )
        found = result.collected
        return Pruned(
            *(result.before.read(), result.kept2, result.changed, result.above_low, result.above_high),
            *(where[:found].copy(), inside[:found].copy()),
        )


def _load() -> Native | None:
    if os.environ.get("SURGERY_KERNELS") == "numpy":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernels" + suffix)
        if path.exists():
            return Native(path)
    return None


native = _load()
