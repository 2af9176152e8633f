"""Actions on one tensor. A method's plan gives each tensor of a pair one of these; an engine carries them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.tensor import Tensor
from surgery.layout import Place

# (|Δ|, |W_pre|, mean|W_pre|) -> S: float32 arrays of one shape, numpy's or torch's, and a float32 value.
Score = Callable[[Any, Any, Any], Any]
# The entries [start, start + count) of a tensor that the n-th fine-tuned model keeps: (name, n, start, count) -> bool [count].
Draw = Callable[[str, int, int, int], Any]
# [τ̂_0, τ̂_1, …] -> (merged, [whether τ̂_0 is part of it, …]): numpy arrays of one shape, float32 and bool.
Combine = Callable[[list[Any]], tuple[Any, list[Any]]]


@dataclass(frozen=True, slots=True)
class Keep:
    """The bits of ft."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The bits of pre, cast to ft's dtype where the two differ."""


@dataclass(frozen=True, slots=True)
class Prune:
    """ft where an entry's score is above the r-th smallest of the tensor, r = round(sparsity · n); elsewhere pre.

    With `top` those at or above the k-th largest are pre's too, k = round(top · n): both ends go; never so in a merge. `kernel`
    names the score's twin in kernels.c, if it has one. With `groups` above 1 the tensor is cut along its outermost dimension into
    so many equal parts, each with a mean and thresholds of its own.
    """

    score: Score
    sparsity: float
    uses_mean: bool = False
    kernel: str = ""
    groups: int = 1
    top: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PruneRows:
    """ft where |Δ| · weight of the column is above the r-th smallest of the group, r = round(sparsity · n); elsewhere pre.

    Attributes:
        weights: float32 [k], or [E, k] for E matrices stacked in one tensor; k runs over the last dimension of the stored
            tensor, or where `transposed` over the last but one.
        transposed: a row is a column of the stored matrix, [in, out].
        whole: the group is a matrix, not one of its rows.
    """

    weights: Any
    sparsity: float
    transposed: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class KeepSalient:
    """ft where |Δ| · weight of the row is at least median + spread · (Q3 − Q1) of these scores over the tensor; elsewhere pre.

    Attributes:
        row_weights: (ft, pre) -> the weights [rows] of some rows [rows, width] of the stored tensor; float64 in, float32 out.
        spread: how far above the median the threshold lies, in distances of the quartiles.
    """

    row_weights: Callable[[Any, Any], Any]
    spread: float


@dataclass(frozen=True, slots=True)
class Shrink:
    """pre and the part of Δ whose singular values are kept, of a matrix [m, n] or each of some stacked ones [E, m, n].

    Attributes:
        keep: (singular values of Δ, falling, m, n) -> which are kept: those above a threshold.
    """

    keep: Callable[[Any, int, int], Any]


@dataclass(frozen=True, slots=True)
class Soften:
    """ft with some of its k leading singular values nearer to what pre has in that direction, likewise.

    Attributes:
        factors: (for each leading left singular vector, its largest |cosine| with any of pre's) -> the factor of what Δ adds to
            its singular value; 1 leaves it.
    """

    k: int
    factors: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Blend:
    """alpha · pre + (1 − alpha) · ft; alpha lies strictly between 0 and 1."""

    alpha: float


@dataclass(frozen=True, slots=True)
class Merge:
    """pre + scale · combine(τ̂_0, τ̂_1, …): τ̂_i is the task vector of the i-th fine-tuned model with some entries set to 0.

    `keeps` says which are not: those that a pruning by itself would keep, of one group, or those that are drawn. Where the merged
    task vector is 0 the output is the bits of pre; where it is one model's task vector, at scale 1, the bits of that model.
    """

    combine: Combine
    scale: float
    keeps: Prune | Draw


Action = Keep | Reset | Prune | PruneRows | KeepSalient | Shrink | Soften | Blend | Merge


@dataclass(frozen=True, slots=True)
class Step:
    """A tensor to write; pre is None where only ft has the tensor.

    Where fine-tuning added rows to the vocabulary, pre has fewer rows than ft: those are edited, the others are ft's.
    `others` are the like tensors of further fine-tuned models, for a merge, with as many rows as pre has.
    """

    ft: Tensor
    pre: Tensor | None
    place: Place
    action: Action
    others: tuple[Tensor, ...] = ()

    @property
    def shared(self) -> Tensor:
        """The part of ft that pre has too."""
        return self.ft if self.pre is None or self.pre.shape == self.ft.shape else self.ft.rows(0, self.pre.shape[0])

    @property
    def added(self) -> Tensor | None:
        """The rows that only ft has, if there are any."""
        if self.pre is None or self.pre.shape == self.ft.shape:
            return None
        return self.ft.rows(self.pre.shape[0], self.ft.shape[0])
