"""Magnitude pruning of the task vector (`surgery magnitude`), the plain baseline of the FAPM paper's §5.2.

    S = |Δ|

The entries that moved least go back to pre.
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
class Magnitude(Method):
    """Magnitude pruning of the task vector.

    Args:
        sparsity: the share of each tensor's entries that goes back to pre, in [0, 1].
        scope: which tensors are pruned, and what becomes of the others.
        group: "tensor", or "expert": each expert of a stacked [E, …] tensor has a threshold of its own.
    """

    name: ClassVar[str] = "magnitude"
    help: ClassVar[str] = """Prune the task vector by magnitude: the weights that moved least go back to pre.

    S = |Δ|. Per tensor, round(sparsity · n) entries go, and with them those tied with the last.
    """
    about: ClassVar[str] = "magnitude pruning of the task vector, S = |Δ|"
    sparsity: float = option(0.9, **SPARSITY)
    scope: Scope = nested(Scope)
    group: str = option("tensor", help=GROUP)

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        one_of("group", self.group, GROUPS)

    def label(self) -> str:
        return f"magnitude-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        prune = Prune(score, self.sparsity, kernel=self.name)
        return plan_pruning(items, self.scope, partial(grouped, prune, self.group))


def score(delta: Any, weight: Any, mean: Any) -> Any:
    """|Δ| itself: float32, numpy or torch, any shape. The other two arguments are FAPM's."""
    return delta
