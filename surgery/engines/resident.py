"""Prune a tensor that is in a device's memory as a whole, in chunks, so that nothing but its bytes is there at full length.

The definitions are `surgery.engines.kernels`' and the search is `surgery.engines.selection.Search`, in torch's operations: a few
passes over the chunks in place of a sort, and the same bits as on the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery.engines.results import Result
from surgery.engines.selection import Search, rank, runs
from surgery.methods.actions import Prune

# Entries of a chunk: few enough for a GPU's cache to hold its float32 copies, and many enough to be worth a launch.
CHUNK = 1 << 22


def slices(n: int) -> Iterator[slice]:
    """Divide n entries into chunks."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a group whose pre and ft are in memory.

    Attributes:
        action: whose score it is.
        pre, ft: floating point [n], on one device.
        mean: mean |W_pre| of the group where the score needs it, a float32 scalar there.
    """

    action: Prune
    pre: torch.Tensor
    ft: torch.Tensor
    mean: torch.Tensor

    def __call__(self, at: slice | torch.Tensor) -> torch.Tensor:
        """Those of the entries in a slice or at some positions: float32, as many."""
        delta, base = task_vector(self.pre[at], self.ft[at])
        found: torch.Tensor = self.action.score(delta.abs_(), base.abs(), self.mean)
        return found


def task_vector(pre: torch.Tensor, ft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Δ, W_pre), float32: Δ = ft − pre is rounded once, from exactly upcast inputs. Δ is a new tensor."""
    wide = torch.float64 if torch.float64 in (pre.dtype, ft.dtype) else torch.float32
    base = pre.to(wide)
    return ft.to(wide, copy=True).sub_(base).float(), base.float()


def keeping(action: Prune, pre: torch.Tensor, ft: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """Find the thresholds of one group.

    Args:
        pre, ft: floating point [n], n ≥ 1, on one device.

    Returns:
        What tells of the entries in a slice which are kept, bool.
    """
    n = len(ft)
    r, k = rank(action.sparsity, n), rank(action.top, n)
    if r + k == 0 or r + k >= n:
        return lambda at: torch.full_like(ft[at], r + k == 0, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64, device=pre.device)
    if action.uses_mean:
        for at in slices(n):
            total += pre[at].abs().sum(dtype=torch.float64)
    scores = Scores(action, pre, ft, (total / n).float())
    limit = threshold(scores, n, r, pre.device)
    ceiling = threshold(scores, n, n - k + 1, pre.device) if k else None

    def keep(at: slice) -> torch.Tensor:
        found = scores(at)
        return found > limit if ceiling is None else (found > limit) & ~(found >= ceiling)

    return keep


def threshold(scores: Callable[[Any], torch.Tensor], n: int, r: int, device: torch.device) -> float:
    """The r-th smallest of n scores: −∞ for r = 0. A score that is NaN counts as −∞.

    Args:
        scores: of the entries in a slice, or at positions (int64 [m]): float32, on the device.
        r: 0 ≤ r ≤ n.
    """
    if r == 0:
        return -np.inf
    starts, length = runs(n)
    if length == n:
        sample = scores(slice(0, n))
    else:
        sample = scores((torch.from_numpy(starts)[:, None] + torch.arange(length)).flatten().to(device))
    search = Search(sample.view(len(starts), length).cpu().numpy(), n, r)
    while not search.found:
        low, high, collect = search.bracket()
        above, inside = torch.zeros(2, dtype=torch.int64, device=device), [sample.new_empty(0)]
        for at in slices(n):
            chunk = scores(at)
            lows, highs = chunk > float(low), chunk > float(high)
            above += torch.stack((lows.sum(), highs.sum()))
            if collect:
                inside.append(chunk[lows ^ highs])
        above_low, above_high = above.tolist()
        search.narrow(above_low, above_high, torch.cat(inside))
    return float(search.threshold)


class Totals:
    """The counts and squared distances of a tensor, summed on its device: the host waits for them once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.squares = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, pre: torch.Tensor, ft: torch.Tensor, out: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Count a chunk: pre and ft, what is written, and which entries of that are ft's by a method's choice."""
        before, weight = task_vector(pre, ft)
        after, _ = task_vector(pre, out)
        kept = torch.zeros_like(self.counts[0]) if keep is None else keep.sum()
        self.counts += torch.stack((kept, (out != pre).sum(), (~out.isfinite()).sum()))
        self.squares += torch.stack([x.double().square_().sum() for x in (before, after, weight)])

    def result(self, entries: int | None) -> tuple[Result, bool]:
        """The result, and whether all that is written is finite.

        Args:
            entries: of the tensor, where a method chose among them.
        """
        kept, differ, infinite = self.counts.tolist()
        before2, after2, weight2 = self.squares.tolist()
        result = Result(None, None, differ, before2, after2, weight2)
        if entries is not None:
            result.kept, result.pruned = kept, entries - kept
        return result, infinite == 0
