"""The exact r-th smallest score of a group, and the choice that follows from it.

For a group of n entries at sparsity s: r = round(s · n), t = the r-th smallest score, and an entry is kept where its score is
above t. Entries tied with t are pruned, so at least r go; r = 0 keeps all (METHODS, "How many entries are pruned"). A score
that is NaN counts as −∞.

`Search` finds t of scores that stream past: a small sample brackets it, one pass counts the scores above each end of the bracket
and collects the few inside it, and the counts prove whether t is among them. When they disprove it the next bracket is drawn on
the side where t must lie. Nothing is estimated in the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import Floats

if TYPE_CHECKING:
    import torch

RUNS, RUN = 512, 512
# A value that takes more than this share of the sample is an atom (Δ = 0 in bfloat16, say): it is counted, never collected.
ATOM = 0.1
# Half the bracket's width, in standard errors of the sampled rank: wide enough that a second pass is rare.
ERRORS = 5.0


def rank(sparsity: float, n: int) -> int:
    """How many of n entries must go: round(sparsity · n), halves to even as Python rounds."""
    return round(sparsity * n)


def runs(n: int) -> tuple[NDArray[np.int64], int]:
    """Where to sample n entries that lie one behind the other: where each run begins, and the length of all.

    Runs come from all over, at most `RUNS` of `RUN` entries; of a small group it is one run, all of it.
    """
    count = min(max(n >> 15, 128), RUNS)
    if n <= 2 * count * RUN:
        return np.zeros(1, np.int64), n
    # One run at random in each stretch: regular steps could fall on the same columns of every row.
    stretch = n / count
    shift = np.random.default_rng(0).random(count)
    starts = ((np.arange(count) + shift) * (stretch - RUN / n * stretch)).astype(np.int64)
    return np.minimum(starts, n - RUN), RUN


class Search:
    """Find the r-th smallest of n scores that stream past, in one pass if the sample is any good.

    While not `found`, ask for a `bracket`, stream all scores past it, and `narrow` with what was counted. Then `threshold` is t.

    Args:
        blocks: float32 [b, k], scores of b runs of k neighbouring entries each; the whole group when small enough.
        n, r: the group's size and the rank, 1 ≤ r ≤ n.
    """

    def __init__(self, blocks: Floats, n: int, r: int) -> None:
        self.n, self.r = n, r
        scores = np.where(np.isnan(blocks), np.float32(-np.inf), blocks)
        self.sample = np.sort(scores, axis=None)
        # The sample's q-th value estimates t. Neighbours resemble each other, so the error is that of b runs, not of b·k draws.
        complete = self.sample.size == n
        self.center = r - 1 if complete else min(int(r / n * self.sample.size), self.sample.size - 1)
        below = (scores <= self.sample[self.center]).mean(axis=1)
        error = ERRORS * float(below.std()) / math.sqrt(len(below))
        self.width = 2 + math.ceil(error * self.sample.size)
        # What the passes so far have proved: floor < t ≤ ceiling. None: t may even be −∞.
        self.floor: np.float32 | None = None
        self.ceiling = np.float32(np.inf)
        self.low, self.high, self.collect = np.float32(-np.inf), self.ceiling, True
        self.found, self.threshold = complete, np.float32(self.sample[self.center])

    def bracket(self) -> tuple[np.float32, np.float32, bool]:
        """(low, high, collect): t is expected in (low, high]. Without collect, t is expected to be high itself."""
        sample = self.sample
        first = 0 if self.floor is None else int(np.searchsorted(sample, self.floor, "right"))
        last = int(np.searchsorted(sample, self.ceiling, "right"))
        self.low = np.float32(-np.inf) if self.floor is None else self.floor
        self.high, self.collect = self.ceiling, True
        if first < last:
            center = min(max(self.center, first), last - 1)
            left, right = max(center - self.width, first), min(center + self.width, last - 1)
            if self._is_atom(sample[center]):
                self.low, self.high, self.collect = _below(sample[center]), sample[center], False
            else:
                if left > first:
                    self.low = _below(sample[left])  # t may be that very value, where many are tied
                if right < last - 1:
                    self.high = sample[right]
                values = np.unique(sample[left : right + 1])
                atoms = values[self._is_atom(values)]
                below, above = atoms[atoms < sample[center]], atoms[atoms > sample[center]]
                if len(below):
                    self.low = max(self.low, below[-1])
                if len(above):
                    self.high = min(self.high, _below(above[0]))
        # Nothing is below −∞, to be collected: t is −∞ or above it.
        self.collect = self.collect and bool(self.high > -np.inf)
        return self.low, self.high, self.collect

    def narrow(self, above_low: int, above_high: int, inside: Floats | torch.Tensor) -> None:
        """Draw the conclusion from a pass.

        Args:
            above_low, above_high: how many scores are above each end of the bracket.
            inside: the scores in it, where they were to be collected; float32 [m], numpy's or on a device.
        """
        if self.r > self.n - above_high:
            self.floor = self.high
        elif self.r <= self.n - above_low and self.high != -np.inf:
            self.ceiling = self.low
        else:
            k = self.r - (self.n - above_low) - 1
            self.threshold = _smallest(inside, k) if self.collect else self.high
            self.found = True
        self.width = 8 * self.width + 1

    def _is_atom(self, values: np.float32 | Floats) -> np.bool_ | NDArray[np.bool_]:
        count = np.searchsorted(self.sample, values, "right") - np.searchsorted(self.sample, values, "left")
        return count > max(8, ATOM * self.sample.size)


def _smallest(values: Floats | torch.Tensor, k: int) -> np.float32:
    """The value that has k others below it."""
    if isinstance(values, np.ndarray):
        return np.float32(np.partition(values, k)[k])
    return np.float32(values.sort().values[k].item())  # a GPU sorts a few per cent of a tensor sooner than it selects


def _below(value: np.float32) -> np.float32:
    return np.float32(np.nextafter(value, np.float32(-np.inf)))
