"""The inner loops of MoFO on a CPU, in place on chunks, in numpy. The versions in `kernels.c` give the same bits.

All numbers are float32, as is the arithmetic, one rounding an operation.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from surgery import native
from surgery.checkpoint.dtypes import Array, Floats, widen
from surgery.engines.kernels import Counted
from surgery.optim import noise

# low, high, and whether to collect: as `selection.Search` draws it.
Bracket = tuple[np.float32, np.float32, bool]
NOTHING: Bracket = (np.float32(np.inf), np.float32(np.inf), False)


# What C calls each filter.
_FILTERS = {"momentum": 0, "gradient": 1, "mv": 2, "random": 3}


def advance(
    score: str,
    draw: tuple[int, int],
    dtype: str,
    gradient: Array,
    m: Floats,
    v: Floats,
    betas: tuple[float, float],
    scores: Floats | None,
    bracket: Bracket,
) -> Counted:
    """m ← m + (1 − β₁)(g − m) and v ← β₂v + (1 − β₂)g²; then score, and count and collect |scores| as `kernels.count` does.

    Args:
        score: "momentum": m; "gradient": g; "mv": m / √v, 0 where m = 0; "random": a whole number below 2²⁴.
        draw: key and first position of the random numbers.
        gradient: raw, of dtype "BF16", "F16" or "F32" (see `surgery.engines.kernels`).
        m, v: one-dimensional, contiguous, as long.
        scores: as long, to write the scores into; None: they are not kept.
        bracket: low, high, and whether to collect.
    """
    rest1, keep, rest2 = np.float32(1 - betas[0]), np.float32(betas[1]), np.float32(1 - betas[1])
    low, high, collect = bracket
    if (compiled := native.compiled) and dtype in compiled.dtypes:
        inside, result = np.empty(len(m) if collect else 0, np.float32), np.empty(3, np.int64)
        _library().advance(
            *(_FILTERS[score], *draw, rest1, keep, rest2, compiled.dtypes[dtype], gradient.ctypes.data, len(m)),
            *(m.ctypes.data, v.ctypes.data, None if scores is None else scores.ctypes.data),
            *(low, high, inside.ctypes.data if collect else None, result.ctypes.data),
        )
        above_low, above_high, collected = result.tolist()
        return Counted(above_low, above_high, inside[:collected].copy())
    key, first = draw
    with np.errstate(all="ignore"):
        g = widen(dtype, gradient)
        m += rest1 * (g - m)
        v[:] = keep * v + rest2 * (g * g)
        if score == "mv":
            found = np.where(m == 0, np.float32(0), m / np.sqrt(v))
        elif score == "random":
            found = noise.uniform(noise.words(np.arange(first, first + len(m)), key)).astype(np.float32)
        else:
            found = m if score == "momentum" else g
    if scores is not None:
        scores[:] = found
    size = np.abs(found)
    lows, highs = size > low, size > high
    inside = size[lows ^ highs] if collect else size[:0]
    return Counted(int(np.count_nonzero(lows)), int(np.count_nonzero(highs)), inside)


def descend(
    score: Floats,
    threshold: np.float32,
    ties: int,
    numbers: tuple[float, float, float, float],
    m: Floats,
    v: Floats,
    p: Floats,
) -> None:
    """p ← decay · p − rate · m / (√v / root + ε) where an entry is chosen; every other entry keeps its bits.

    Chosen is an entry whose |score| is above the threshold, and among the first `ties` also one that is equal to it. A score
    that is NaN counts as −∞.

    Args:
        score, m, v, p: one-dimensional, contiguous, equally long.
        numbers: decay, rate, root and ε.
    """
    decay, rate, root, epsilon = map(np.float32, numbers)
    if native.compiled:
        _library().descend(
            *(score.ctypes.data, threshold, ties, decay, rate, root, epsilon),
            *(m.ctypes.data, v.ctypes.data, len(p), p.ctypes.data),
        )
        return
    size = np.where(np.isnan(score), np.float32(-np.inf), np.abs(score))
    chosen = size > threshold
    chosen[:ties] |= size[:ties] == threshold
    with np.errstate(all="ignore"):
        np.copyto(p, p * decay - rate * (m / (np.sqrt(v) / root + epsilon)), where=chosen)


@cache
def _library() -> ctypes.CDLL:
    compiled = native.compiled
    assert compiled
    library = compiled.library
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    code, word = ctypes.c_int, ctypes.c_uint64
    library.advance.argtypes = [
        *(code, word, word, number, number, number, code, pointer, size),
        *(pointer, pointer, pointer, number, number, pointer, pointer),
    ]
    library.descend.argtypes = [pointer, number, size, *[number] * 4, pointer, pointer, size, pointer]
    library.advance.restype = library.descend.restype = None
    return library
