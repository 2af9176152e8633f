"""FAPM: forgetting-aware pruning of the task vector (`surgery fapm`).

An entry earns its place by how far it moved, less how far it moved for its size:

    S = |Δ| − mean(|W_pre|) · |Δ| / |W_pre|        (FAPM paper, Eq. 1 and Algorithm 1)

    Δ       ft − pre, one tensor, any shape
    W_pre   the pre-trained tensor, Δ's shape
    mean    over all entries of the tensor, a scalar: it brings the ratio to the scale of |Δ|

The entries with the lowest scores go back to pre: a large relative change of a small weight is what makes a model forget.
METHODS decides what the paper leaves open: S = 0 where Δ = 0, and −∞ (pruned first) where W_pre = 0 and Δ ≠ 0.

Cost: pre is read twice, since the mean stands before the first score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from surgery.checkpoint.item import Item
from surgery.methods.actions import Action, Prune
from surgery.methods.method import Method
from surgery.methods.scope import GROUP, GROUPS, SPARSITY, Scope, grouped, number, one_of, plan_pruning, share
from surgery.option import nested, option


@dataclass(frozen=True)
class Fapm(Method):
    """Ratio-aware pruning of the task vector.

    Args:
        sparsity: the share of each tensor's entries that goes back to pre, in [0, 1]. The paper's is 0.9.
        scope: which tensors are pruned, and what becomes of the others.
        group: "tensor", or "expert": each expert of a stacked [E, …] tensor has a threshold of its own.
    """

    name: ClassVar[str] = "fapm"
    help: ClassVar[
        str
    ] = """Prune the task vector by FAPM's score: how far a weight moved, less how far it moved for its size.

    S = |Δ| − mean(|W_pre|) · |Δ| / |W_pre|, the lowest go back to pre. An entry with Δ = 0 scores 0; one with W_pre = 0 and
    Δ ≠ 0 goes first. Per tensor, round(sparsity · n) entries go, and with them those tied with the last.
    """
    about: ClassVar[str] = "FAPM, S = |Δ| − mean(|W_pre|) · |Δ| / |W_pre|"
    sparsity: float = option(0.9, **SPARSITY)
    scope: Scope = nested(Scope)
    group: str = option("tensor", help=GROUP)

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        one_of("group", self.group, GROUPS)

    def label(self) -> str:
        return f"fapm-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        prune = Prune(score, self.sparsity, uses_mean=True, kernel=self.name)
        return plan_pruning(items, self.scope, partial(grouped, prune, self.group))


def score(delta: Any, weight: Any, mean: Any) -> Any:
    """FAPM's score of each entry.

    Args:
        delta: |Δ|, float32, numpy or torch, any shape.
        weight: |W_pre|, float32, delta's shape.
        mean: mean |W_pre| over the whole tensor, a float32 value.

    Returns:
        S, float32, delta's shape. Evaluated from left to right, (mean · |Δ|) / |W_pre|.
    """
    result = delta - mean * delta / weight
    zero = weight == 0
    if zero.any():
        result[zero] = -float("inf")
        result[zero & (delta == 0)] = 0.0
    return result
