"""The inner loops of MoFO on a CPU, on chunks in place: numpy is the definition, the C twins in `kernels.c` give the same bits.

All numbers are float32, as is the arithmetic, one rounding an operation.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from surgery import kernels
from surgery.kernels import Array, Floats


def moments(dtype: str, gradient: Array, m: Floats, v: Floats, beta1: float, beta2: float) -> None:
    """m ← m + (1 − β₁)(g − m) and v ← β₂v + (1 − β₂)g².

    Args:
        gradient: raw, of dtype "BF16", "F16" or "F32" (see `surgery.kernels`).
        m, v: one-dimensional, contiguous, as long.
    """
    rest1, keep, rest2 = np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    if kernels.native and dtype in kernels.native.dtypes:
        _library().moments(
            *(rest1, keep, rest2, kernels.native.dtypes[dtype], gradient.ctypes.data, len(m)),
            *(m.ctypes.data, v.ctypes.data),
        )
        return
    with np.errstate(all="ignore"):
        g = kernels.widen(dtype, gradient)
        m += rest1 * (g - m)
        v[:] = keep * v + rest2 * (g * g)


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
    if kernels.native:
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
    assert kernels.native
    library = kernels.native.library
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    library.moments.argtypes = [*[number] * 3, ctypes.c_int, pointer, size, pointer, pointer]
    library.descend.argtypes = [pointer, number, size, *[number] * 4, pointer, pointer, size, pointer]
    library.moments.restype = library.descend.restype = None
    return library
