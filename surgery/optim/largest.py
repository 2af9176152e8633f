"""Find the entries with the k largest |scores| exactly; of tied entries, those with the lowest index.

The answer is a threshold and a number of ties: chosen is an entry whose |score| is above the threshold, and among the first
`ties` entries also one that is equal to it. A score that is NaN counts as −∞.

`largest` looks at an array in memory with the `Search` that pruning uses; `largest_of_pieces` at a tensor whose pieces lie in
several processes, by exchanging counts; `chosen` at a tensor on any device, without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import Floats
from surgery.engines import kernels
from surgery.engines.kernels import Counted
from surgery.engines.selection import Search
from surgery.methods import magnitude
from surgery.methods.actions import Prune
from surgery.optim.kernels import Bracket
from surgery.optim.piece import Piece

CHUNK = 1 << 18
# How a function is mapped over chunks: `map`, or that of a pool of threads.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Runs of a sample, and the entries of a run. A tensor of twice as many is sorted whole.
RUNS, RUN = 128, 128
SAMPLE = 2 * RUNS * RUN
_SHIFTS = np.random.default_rng(0).random(RUNS)

# |Δ| with a pre of zeros is |score|, so that pruning's pass over a chunk does for MoFO.
_SCORE = Prune(magnitude.score, 0.0, kernel="magnitude")
_ZEROS = np.zeros(CHUNK, np.uint16)
_DIGIT = 11  # bits of a number that one histogram resolves


def slices(n: int) -> Iterator[slice]:
    """Divide n entries into chunks that fit a processor's cache."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def places(n: int) -> NDArray[np.int64]:
    """Return the positions of a sample of a tensor with more than `SAMPLE` entries: [runs, entries of a run].

    Fewer than for pruning, where a second pass over the scores reads two files again; here they are in memory.
    """
    # A run of neighbours in each stretch, at a place that no regularity of the tensor follows.
    starts = ((np.arange(RUNS) + _SHIFTS) * ((n - RUN) / RUNS)).astype(np.int64)
    return starts[:, None] + np.arange(RUN)


def largest(search: Search, passed: list[Counted], scores: Floats, each: Each) -> tuple[np.float32, int]:
    """Find the threshold of the k largest |scores|, and how many entries tied with it are chosen.

    Args:
        search: of the (n − k + 1)-th smallest |score|, 1 ≤ k < n, after its first bracket.
        passed: what was counted in that bracket, chunk by chunk.
        scores: float32 [n], contiguous.
        each: maps over chunks; the result does not depend on it.
    """
    n = len(scores)
    above = n - int(np.searchsorted(search.sample, search.threshold, "right"))
    tied = n - above - int(np.searchsorted(search.sample, search.threshold, "left"))
    while not search.found:
        above_low, above_high = sum(part.above_low for part in passed), sum(part.above_high for part in passed)
        inside = np.concatenate([part.inside for part in passed])
        search.narrow(above_low, above_high, inside)
        above = above_high + int(np.count_nonzero(inside > search.threshold))
        tied = int(np.count_nonzero(inside == search.threshold)) if search.collect else above_low - above_high
        if not search.found:
            passed = list(each(partial(_count, search.bracket()), (scores[at] for at in slices(n))))
    if search.threshold == -np.inf:
        tied = n - above
    wanted = n - search.r + 1 - above
    return search.threshold, n if tied == wanted else _end_of_ties(scores, search.threshold, wanted)


def _count(bracket: Bracket, scores: Floats) -> Counted:
    return kernels.count(_SCORE, np.float32(0), bracket, "BF16", _ZEROS[: len(scores)], "F32", scores)


def _end_of_ties(scores: Floats, threshold: np.float32, wanted: int) -> int:
    """Return how many entries must be passed to find `wanted` ones that are tied with the threshold."""
    for at in slices(len(scores)):
        tied = np.isnan(scores[at]) if threshold == -np.inf else np.abs(scores[at]) == threshold
        places = np.flatnonzero(tied)
        if len(places) >= wanted:
            return int(at.start + places[wanted - 1]) + 1
        wanted -= len(places)
    raise AssertionError("there are fewer ties than were counted")


def chosen(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return a mask of the k largest |scores|, without the host waiting for the device.

    Args:
        scores: [n], floating point, any device.
        k: 1 ≤ k ≤ n.
    """
    sizes = scores.abs().nan_to_num_(nan=-math.inf, posinf=math.inf)
    threshold = torch.topk(sizes, k, sorted=False).values.amin()
    above, tied = sizes > threshold, sizes == threshold
    del sizes  # before the count of ties takes as much
    return above | (tied & (tied.cumsum(0, dtype=torch.int32) <= k - above.sum()))


def largest_of_pieces(scores: torch.Tensor, k: int, piece: Piece) -> tuple[float, int]:
    """Find the threshold of the k largest |scores| of a whole tensor, and the ties chosen in this process's piece.

    Every process that holds a piece must call this at the same time. What they exchange is histograms, of 2¹¹ counts each: of the
    leading bits of the scores, then of the bits that follow, and of positions where only some of the tied entries are chosen.

    Args:
        scores: float32 or float64 [entries of the piece], any device.
        k: 1 ≤ k ≤ entries of the whole tensor; ties go to the lowest index in the whole tensor.
    """
    # The bits of a number that is not negative are in its order. NaN comes first, as 0.
    word, bits = (torch.int64, 63) if scores.dtype == torch.float64 else (torch.int32, 31)
    keys = torch.where(scores.isnan(), 0, scores.abs().view(word) + 1)
    found, wanted, tied = _kth_largest(keys, k, bits, piece)
    threshold = float(torch.tensor(found - 1, dtype=word).view(scores.dtype)) if found else -math.inf
    if tied == wanted:
        return threshold, len(scores)
    # Entries of a piece are in the order of their positions in the whole.
    local = (keys == found).nonzero().flatten()
    positions = piece.positions(local)
    backwards, _, _ = _kth_largest(piece.size - 1 - positions, wanted, piece.size.bit_length(), piece)
    mine = int((positions <= piece.size - 1 - backwards).sum())
    return threshold, int(local[mine - 1]) + 1 if mine else 0


def _kth_largest(keys: torch.Tensor, k: int, bits: int, piece: Piece) -> tuple[int, int, int]:
    """The k-th largest key of all pieces; how many of those equal to it are among the k largest; how many are equal to it.

    Args:
        keys: this piece's, int32 or int64, 0 ≤ key < 2^bits.
    """
    found, tied = 0, 0
    for shift in reversed(range(0, bits, _DIGIT)):
        digits = keys >> shift
        digits = digits[digits >> _DIGIT == found] & (1 << _DIGIT) - 1
        counts = torch.bincount(digits, minlength=1 << _DIGIT)
        piece.add_up(counts)
        down = counts.cpu().numpy()[::-1]
        at_least = np.cumsum(down)
        place = int(np.searchsorted(at_least, k))
        k -= int(at_least[place] - down[place])
        found, tied = found << _DIGIT | len(down) - 1 - place, int(down[place])
    return found, k, tied
