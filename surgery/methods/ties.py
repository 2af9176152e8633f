"""TIES: trim, elect a sign, merge (`surgery ties`; Yadav et al., "TIES-Merging", arXiv 2306.01708, §4 and Algorithm 1).

    τ_i = ft_i − pre                                         one tensor of the i-th fine-tuned model, any shape
    τ̂_i = τ_i where |τ_i| > t_i, else 0                      trim: t_i is the r-th smallest |τ_i|, r = round(sparsity · n)
    γ   = sgn(Σ_i τ̂_i)                                       elect: the sign with the larger mass, entry by entry
    τ_m = mean of the τ̂_i ≠ 0 whose sign is γ                merge: over those only
    out = pre + λ · τ_m

The paper keeps the top 20% (sparsity 0.8) and recommends λ = 1. Our decisions: a group is one tensor, where the paper trims over
the whole model; entries that tie with t_i are trimmed; where the votes cancel exactly γ = 0 and the entry is pre's (the authors'
code takes the majority of the whole model there, mergekit the plus sign).

Sums are float32, in the order of the models. Where τ_m = 0 the output is the bits of pre. Where λ = 1 and one model alone is in
τ_m it is the bits of that model, since pre + (ft − pre) rounds: with one model and λ = 1, TIES is magnitude pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgery.checkpoint.item import Item
from surgery.methods import magnitude
from surgery.methods.actions import Action, Merge, Prune
from surgery.methods.method import Method
from surgery.methods.scope import LAM, SPARSITY, Scope, finite, number, plan_pruning, share
from surgery.option import nested, option


@dataclass(frozen=True)
class Ties(Method):
    """Merge the trimmed task vectors of one or more fine-tuned models, where their signs agree.

    Args:
        sparsity: the share of each task vector's entries that is trimmed, in [0, 1]; the paper's density is 1 − sparsity.
        lam: λ, the factor of the merged task vector.
        scope: which tensors are merged, and what becomes of the others.
    """

    name: ClassVar[str] = "ties"
    merges: ClassVar[bool] = True
    help: ClassVar[
        str
    ] = """Merge task vectors by TIES: trim each, elect a sign for every entry, average those that agree.

    out = pre + λ · mean of the trimmed ft − pre that have the sign of their sum. Per tensor and --ft, round(sparsity · n) entries
    are trimmed, and with them those tied with the last. With one --ft and λ = 1 this is magnitude pruning.
    """
    about: ClassVar[str] = "TIES, trim, elect sign and merge (arXiv 2306.01708)"
    sparsity: float = option(
        0.8,
        help="Share of each task vector's entries that is trimmed, from 0 to 1: those that moved least.",
        swept=SPARSITY["swept"],
    )
    lam: float = option(1.0, help=LAM)
    scope: Scope = nested(Scope)

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        finite("lam", self.lam)

    def label(self) -> str:
        return f"ties-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        trim = Prune(magnitude.score, self.sparsity, kernel="magnitude")
        return plan_pruning(items, self.scope, lambda _: Merge(combine, self.lam, trim))


def combine(trimmed: list[Any]) -> tuple[Any, list[Any]]:
    """Elect and merge.

    Args:
        trimmed: τ̂_i, float32, one shape.

    Returns:
        τ_m, float32, and for each model the entries (bool) that are part of it.
    """
    vote = sum(trimmed[1:], start=trimmed[0])
    plus, minus = vote > 0, vote < 0
    agree = [((vector > 0) & plus) | ((vector < 0) & minus) for vector in trimmed]
    total = sum(masked(vector, part) for vector, part in zip(trimmed, agree, strict=True))
    voters = sum(part.astype(np.float32) for part in agree)
    return total / np.maximum(voters, np.float32(1)), agree


def masked(vector: Any, keep: Any) -> Any:
    """The vector (float32) where keep (bool) is true, elsewhere 0, in place of NaN too.

    A product of integers, since np.where branches at every entry.
    """
    return (vector.view(np.uint32) * keep).view(np.float32)
