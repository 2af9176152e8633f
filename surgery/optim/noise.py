"""Random numbers that depend on a key and a position alone, so that no generator's state has to be kept.

The same on every device, however a tensor is cut into chunks or spread over processes, and the same again when a run is resumed.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Words = TypeVar("Words", NDArray[np.int64], torch.Tensor)

# The mixer of SplitMix64 (Steele, Lea and Flood 2014), with its constants as signed numbers.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_GOLDEN = 0x9E3779B97F4A7C15


def key(*parts: int) -> int:
    """One signed 64-bit number from several integers."""
    state = 0
    for part in parts:
        state = int(words(np.array([_signed(state * 31 + part * _GOLDEN + 1)], np.int64), 0)[0])
    return state


def words(positions: Words, key: int) -> Words:
    """Random signed 64-bit words, int64 of the positions' shape (int64)."""
    x = positions * _signed(_GOLDEN) + key
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(words: Words) -> Words:
    """The words' top 24 bits: whole numbers that float32 has, int64."""
    return words >> 40 & (1 << 24) - 1


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
