"""Breadcrumbs: both ends of the task vector go back to pre (`surgery breadcrumbs`; Davari and Belilovsky, arXiv 2312.06795).

    out = ft where t < |Δ| < u, elsewhere pre

    Δ       ft − pre, one tensor, any shape, n entries
    t       the r-th smallest |Δ|, r = round(sparsity · n)
    u       the k-th largest |Δ|, k = round(top · n)

The smallest changes are noise, and the largest, by the paper, outliers that disturb what the base model knew. Entries that tie
with t or u go too. With r = 0 there is no t, with k = 0 no u: then this is magnitude pruning.

`sparsity` is the share at the bottom alone, and `top` comes on top of it; mergekit's density is what is left, 1 − sparsity − top.

Cost: one more pass over both files than magnitude pruning, for u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from surgery.checkpoint.item import Item
from surgery.methods import magnitude
from surgery.methods.actions import Action, Prune
from surgery.methods.method import Method
from surgery.methods.scope import GROUP, GROUPS, SPARSITY, Scope, grouped, number, one_of, plan_pruning, share
from surgery.option import Swept, nested, option


@dataclass(frozen=True)
class Breadcrumbs(Method):
    """Magnitude pruning of the task vector at both ends.

    Args:
        sparsity: the share of each tensor's entries that goes back to pre because they moved least, in [0, 1].
        top: the share that goes back because they moved most, in [0, 1]. The paper's is 0.01.
        scope: which tensors are pruned, and what becomes of the others.
        group: "tensor", or "expert": each expert of a stacked [E, …] tensor has thresholds of its own.
    """

    name: ClassVar[str] = "breadcrumbs"
    help: ClassVar[
        str
    ] = """Prune the task vector at both ends: the weights that moved least, and the few that moved most.

    Per tensor, the round(sparsity · n) smallest |Δ| and the round(top · n) largest go back to pre, and those tied with them.
    """
    about: ClassVar[str] = "Model Breadcrumbs, both ends of |Δ| pruned (arXiv 2312.06795)"
    sparsity: float = option(0.9, **SPARSITY)
    top: float = option(
        0.01,
        help="Share of each tensor's entries, those that moved most, that goes back to pre too, from 0 to 1.",
        swept=Swept("0.01", "share at the top"),
    )
    scope: Scope = nested(Scope)
    group: str = option("tensor", help=GROUP)

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        share("top", self.top)
        one_of("group", self.group, GROUPS)

    def label(self) -> str:
        return f"breadcrumbs-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        prune = Prune(magnitude.score, self.sparsity, kernel="magnitude", top=self.top)
        return plan_pruning(items, self.scope, partial(grouped, prune, self.group))
