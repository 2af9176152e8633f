"""Intruder reduction (`surgery intruder`; Shuttleworth et al., "LoRA vs Full Fine-tuning", arXiv 2410.21228).

    W_ft = Σ_i σ_i · u_i · v_iᵀ                      of each matrix, [m, n], as it is stored; σ falling
    c_i = max_j |u_iᵀ · u_j(W_pre)|                  over all left singular vectors of pre's matrix
    out = W_ft + Σ_{i ≤ k, c_i < ε} (factor − 1) · (u_iᵀ Δ v_i) · u_i · v_iᵀ

A leading singular vector of ft that resembles none of pre's is an intruder: training, with LoRA above all, has put it
there, and by the paper it is what forgets. u_iᵀ Δ v_i is what Δ adds to its singular value. That is scaled: at factor 0
the direction has what pre has in it, at 1 the output is ft. The paper scales σ_i itself, which also takes away what pre
had there: our decision.

Where a matrix has no intruder the output is the bits of ft; elsewhere it is computed in float64 and rounded once. Experts
stacked in one tensor [E, m, n] are a matrix each. Cost: see `surgery.engines.spectral`; two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action, Keep, Soften
from surgery.methods.method import Method
from surgery.methods.scope import Scope, matrices, number, plan_pruning, share
from surgery.option import Swept, nested, option

K, EPSILON = 10, 0.5


@dataclass(frozen=True)
class Intruder(Method):
    """Scale down what fine-tuning put into directions that pre does not have.

    Args:
        factor: of the change of an intruder's singular value, in [0, 1]: 1 gives ft.
        epsilon: the |cosine| under which a vector is an intruder, in [0, 1].
        k: how many leading singular vectors are looked at, 1 or more.
        scope: which tensors are edited, and what becomes of the others.
    """

    name: ClassVar[str] = "intruder"
    help: ClassVar[str] = """Scale down intruders: leading singular vectors of ft that resemble none of pre's.

    Of the k leading left singular vectors, those whose largest |cosine| with any of pre's is under ε. Needs memory for two
    Gram matrices of the smaller side: 0.9 GB for a side of 4,096.
    """
    about: ClassVar[str] = "intruder dimensions scaled down (arXiv 2410.21228)"
    slow: ClassVar[bool] = True
    factor: float = option(
        0.75,
        help="Factor of the change of an intruder's singular value, from 0 (as pre) to 1 (as ft).",
        swept=Swept("0:0.75:0.25", "factor of an intruder's change"),
    )
    epsilon: float = option(
        EPSILON, help="A vector is an intruder where no |cosine| with pre's reaches this, from 0 to 1."
    )
    k: int = option(K, help="How many leading singular vectors of a matrix are looked at.")
    scope: Scope = nested(Scope)

    def __post_init__(self) -> None:
        share("factor", self.factor)
        share("epsilon", self.epsilon)
        if self.k < 1:
            raise OptionError(f"`k` must be 1 or more, not {self.k}.")

    def label(self) -> str:
        return f"intruder-{number(self.factor)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        action = Soften(self.k, partial(factors, self.factor, self.epsilon)) if self.factor < 1 else Keep()
        return plan_pruning(items, self.scope, partial(matrices, action))


def factors(factor: float, epsilon: float, cosines: Any) -> Any:
    """The factor of each vector's change: float64, the shape of `cosines`."""
    return np.where(cosines < epsilon, factor, 1.0)
