"""What can happen to one tensor. A method's plan gives each tensor of a pair one of these; an engine carries them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# (|Δ|, |W_pre|, mean|W_pre|) -> S: float32 arrays of one shape, numpy's or torch's, and a float32 value.
Score = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Keep:
    """The bits of ft."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The bits of pre, cast to ft's dtype where the two differ."""


@dataclass(frozen=True, slots=True)
class Prune:
    """ft where an entry's score is above the r-th smallest of the tensor, r = round(sparsity · n); elsewhere pre.

    `kernel` names the score's twin in kernels.c, if it has one. With `groups` above 1 the tensor is cut along its outermost
    dimension into so many equal parts, each with a mean and a threshold of its own.
    """

    score: Score
    sparsity: float
    uses_mean: bool = False
    kernel: str = ""
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Blend:
    """alpha · pre + (1 − alpha) · ft; alpha lies strictly between 0 and 1."""

    alpha: float


Action = Keep | Reset | Prune | Blend
