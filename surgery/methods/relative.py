"""Relative change as the only criterion of pruning (`surgery relative`), which the FAPM paper looks at in §3.1 beside |Δ|.

    S = |Δ| / |W_pre|

    Δ       ft − pre, one tensor, any shape, n entries
    W_pre   the pre-trained tensor, Δ's shape

S = 0 where Δ = 0, and +∞ where W_pre = 0 and Δ ≠ 0: so the formula has it in the limit. The paper compares the two criteria in
pictures and prunes by neither end of this one alone, so both ends are here:

    low     the r = round(sparsity · n) lowest go back to pre, and those tied with the last: read as |Δ| is read, the default
    high    the r highest go, and those tied with the last: FAPM's second term alone, by which a large change of a small weight
            is what makes a model forget. Entries with Δ = 0 come last, so that r of those that moved go back.

Cost: as magnitude pruning, in numpy.
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
from surgery.option import Swept, nested, option

ENDS = ("low", "high")


@dataclass(frozen=True)
class Relative(Method):
    """Pruning of the task vector by its ratio to the pre-trained weights.

    Args:
        sparsity: the share of each tensor's entries that goes back to pre, in [0, 1].
        end: "low" or "high": which scores go.
        scope: which tensors are pruned, and what becomes of the others.
        group: "tensor", or "expert": each expert of a stacked [E, …] tensor has a threshold of its own.
    """

    name: ClassVar[str] = "relative"
    help: ClassVar[str] = """Prune the task vector by relative change alone: how far a weight moved for its size.

    S = |Δ| / |W_pre|, 0 where Δ = 0, +∞ where W_pre = 0 and Δ ≠ 0. Per tensor, the round(sparsity · n) entries at one end go back
    to pre, and with them those tied with the last.
    """
    about: ClassVar[str] = "pruning of the task vector by relative change, S = |Δ| / |W_pre|"
    sparsity: float = option(0.9, **SPARSITY)
    end: str = option(
        "low",
        help="Which scores go: [b]low[/b], or [b]high[/b], the large changes of small weights.",
        swept=Swept("low,high", "end"),
    )
    scope: Scope = nested(Scope)
    group: str = option("tensor", help=GROUP)

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        one_of("end", self.end, ENDS)
        one_of("group", self.group, GROUPS)

    def label(self) -> str:
        return f"relative-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        prune = Prune(score, self.sparsity) if self.end == "low" else Prune(score, 0.0, top=self.sparsity)
        return plan_pruning(items, self.scope, partial(grouped, prune, self.group))


def score(delta: Any, weight: Any, mean: Any = None) -> Any:
    """The ratio of each entry.

    Args:
        delta: |Δ|, float32, numpy or torch, any shape.
        weight: |W_pre|, float32, delta's shape.
        mean: not used; FAPM's.

    Returns:
        S, float32, delta's shape.
    """
    result = delta / weight
    still = delta == 0
    if still.any():
        result[still] = 0.0
    return result
