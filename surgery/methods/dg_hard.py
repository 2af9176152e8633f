"""DG-Hard: small singular values of the task vector go to zero (`surgery dg-hard`; arXiv 2605.20296).

    Δ = Σ_i σ_i · u_i · v_iᵀ                         of each matrix, [m, n]
    out = pre + Σ_{σ_i > τ} σ_i · u_i · v_iᵀ
    τ = scale · ω(β) · median(σ) / μ_β               β = min(m, n) / max(m, n)
    ω(β)² = 2(β + 1) + 8β / (β + 1 + √(β² + 14β + 1))

    μ_β     the median singular value of noise: the root of the median of the Marchenko–Pastur law of ratio β

This is the optimal hard threshold of Gavish and Donoho (arXiv 1305.5870) for a matrix in white noise whose level is unknown: what
fine-tuning added as noise goes, what has structure stays. The output is computed in float64 and rounded once to ft's dtype: its
entries are no longer stored bits. Where τ cuts nothing it is the bits of ft, where it cuts everything those of pre.

Experts stacked in one tensor [E, m, n] are a matrix each. Cost: see `surgery.engines.spectral`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action, Keep, Shrink
from surgery.methods.method import Method
from surgery.methods.scope import Scope, finite, matrices, number, plan_pruning
from surgery.option import Swept, nested, option


@dataclass(frozen=True)
class DgHard(Method):
    """Drop the singular values of the task vector that noise would have.

    Args:
        scale: the factor of the threshold, 0 or more: 1 is the optimal one, 0 gives ft.
        scope: which tensors are edited, and what becomes of the others.
    """

    name: ClassVar[str] = "dg-hard"
    help: ClassVar[str] = """Drop the small singular values of the task vector, those that noise would have (DG-Hard).

    τ = scale · ω(β) · median(σ) / μ_β, per matrix; σ ≤ τ goes to zero. Needs memory for the Gram matrix of the smaller side:
    0.7 GB for a side of 4,096.
    """
    about: ClassVar[str] = "DG-Hard, spectral shrinkage of the task vector (arXiv 2605.20296)"
    slow: ClassVar[bool] = True
    scale: float = option(
        1.0,
        help="Factor of the threshold, 0 or more: a higher one leaves fewer singular values.",
        swept=Swept("0.5:2:0.25", "scale of the threshold"),
    )
    scope: Scope = nested(Scope)

    def __post_init__(self) -> None:
        finite("scale", self.scale)
        if self.scale < 0:
            raise OptionError(f"`scale` must be 0 or greater, not {self.scale}.")

    def label(self) -> str:
        return f"dg-hard-{number(self.scale)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        action = Shrink(partial(above, self.scale)) if self.scale else Keep()
        return plan_pruning(items, self.scope, partial(matrices, action))


def above(scale: float, values: Any, height: int, width: int) -> Any:
    """Which singular values (float64 [min(height, width)]) are kept: bool."""
    return values > scale * threshold(height, width) * np.median(values)


@cache
def threshold(height: int, width: int) -> float:
    """ω(β) / μ_β: the optimal threshold in units of the median singular value."""
    beta = min(height, width) / max(height, width)
    omega2 = 2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1))
    return float(np.sqrt(omega2 / median_of_noise(beta)))


def median_of_noise(beta: float) -> float:
    """The median of the Marchenko–Pastur law of ratio β in (0, 1], of eigenvalues.

    With x = 1 + β + 2√β · cos φ its density, √((b − x)(x − a)) / (2πβx), becomes the smooth 2 sin²φ / (πx), summed at midpoints.
    """
    steps = 1 << 16
    angles = np.pi * (1 - (np.arange(steps) + 0.5) / steps)  # from the smallest x
    mass = np.cumsum(2 * np.sin(angles) ** 2 / (1 + beta + 2 * np.sqrt(beta) * np.cos(angles)))
    angle = np.interp(0.5, mass / mass[-1], angles - 0.5 * np.pi / steps)
    return float(1 + beta + 2 * np.sqrt(beta) * np.cos(angle))
