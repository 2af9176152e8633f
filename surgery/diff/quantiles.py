"""Estimate quantiles of magnitudes in bounded memory, from a histogram whose bins all have the same relative width.

A bin holds the float32 magnitudes that agree in their upper 15 bits, the exponent and 7 bits of the mantissa. A quantile is the
middle of its bin, so it is off by at most 1/256 of itself (by 1e-40 below 1.2e-38, where float32 runs out of exponents; smaller
than that counts as 0). The largest is exact.

A tensor of n < 2^18 entries is counted in full. Of a larger one, one entry in 2^s is counted, drawn by a hash from each stretch
of 2^s, so that at least 2^17 are (s ≤ 8; the same ones in every run). What is shown for the share q is then, to 1/256, the
quantile of all entries for some q′ near q: the standard deviation of q′ is at most √(q(1 − q)/m) for m draws, 0.0014 at the
median and 0.0003 at 1% and 99%, and |q′ − q| > 0.006 has a probability below 0.001 (Hoeffding).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.engines.kernels import BINS, Counts

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# The bin of infinity; the bins after it hold NaN.
INFINITE = 0x7F80


def sample_shift(entries: int) -> int:
    """Return s: of a tensor with so many entries, one in 2^s is counted."""
    return min(max((entries >> 17).bit_length() - 1, 0), 8)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The counts of finite magnitudes. Only bins that hold any are kept, in order.

    Attributes:
        bins: uint16 [k], the upper half of a float32 without its sign.
        counts: int64 [k], entries of the tensor, not of the sample.
    """

    bins: NDArray[np.uint16]
    counts: Counts

    @classmethod
    def of(cls, counts: Counts, shift: int) -> Histogram:
        """Make a histogram of the counts, int64 [BINS], of a sample of one entry in 2^shift."""
        bins = np.flatnonzero(counts[:INFINITE])
        return cls(bins.astype(np.uint16), counts[bins] << shift)

    def quantiles(self, shares: Iterable[float]) -> list[float] | None:
        """Return for each share the smallest magnitude such that this share of entries is not above it; None without entries."""
        if not len(self.bins):
            return None
        below = np.cumsum(self.counts)
        ranks = [max(math.ceil(share * int(below[-1])), 1) for share in shares]
        found = self.bins[np.searchsorted(below, ranks)].astype(np.uint32)
        middles: list[float] = np.where(found, found << 16 | 0x8000, 0).astype(np.uint32).view(np.float32).tolist()
        return middles


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram and the largest finite magnitude."""

    histogram: Histogram
    largest: float

    def as_json(self) -> dict[str, float | None]:
        """Return the quantiles and the largest magnitude; each is None where no entry is finite."""
        found = self.histogram.quantiles(QUANTILES.values())
        if found is None:
            return dict.fromkeys((*QUANTILES, "max"))
        return {
            **{name: min(value, self.largest) for name, value in zip(QUANTILES, found, strict=True)},
            "max": self.largest,
        }


def joined(parts: Iterable[Distribution]) -> Distribution:
    """Return the distribution of all entries of several tensors."""
    counts, largest = np.zeros(BINS, np.int64), 0.0
    for part in parts:
        counts[part.histogram.bins] += part.histogram.counts
        largest = max(largest, part.largest)
    return Distribution(Histogram.of(counts, 0), largest)
