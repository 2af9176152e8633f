"""GEM and A-GEM: a step's gradient is turned so that it does not raise the loss on what came before.

    GEM      g̃ = argmin ½‖g̃ − g‖²  with ⟨g̃, g_k⟩ ≥ 0 for each part k of the memory       (Lopez-Paz & Ranzato 2017, Eq. 8–11)
    A-GEM    g̃ = g − ⟨g, r⟩ / ⟨r, r⟩ · r  where ⟨g, r⟩ < 0, r the gradient on all of it   (Chaudhry et al. 2019, Eq. 11)

A part is the rows of an earlier round or of an older file, or own text; g_k is the gradient of its mean loss at the weights of
the step, over those that are trained. GEM's dual, min ½ vᵀGGᵀv + gᵀGᵀv with v ≥ 0, is a non-negative least-squares problem of as
many unknowns as parts, and g̃ = g + Gᵀv. Its margin is 0. Cost: in each step a pass over the memory, and a gradient for each part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.holds.memory import mean_gradient, resting, some
from surgery.train.settings import Settings


class Gem(Hold):
    """The projection.

    Args:
        averaged: A-GEM: one constraint on all of the memory.
        most: rows of each part of the memory.
    """

    def __init__(self, averaged: bool, most: int) -> None:
        self.averaged, self.most, self.turned = averaged, most, 0
        self.scene: Scene | None = None
        self.parts: list[list[Any]] = []

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls(settings.gem == "a-gem", settings.memory_rows) if settings.gem else None

    def begin(self, scene: Scene) -> None:
        """Choose the rows to remember."""
        parts = [some(part, self.most, scene.seed) for part in scene.memory if part]
        self.parts = [[row for part in parts for row in part]] if self.averaged and parts else parts
        self.scene, self.turned = scene, 0

    def gradients(self, model: nn.Module) -> None:
        if not self.parts or self.scene is None:
            return
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        own = [parameter.grad for parameter in trained if parameter.grad is not None]
        with resting(model):
            memory = [mean_gradient(self.scene, part, trained) for part in self.parts]
        factors = turn(
            np.array([_dot(one, own) for one in memory]), np.array([[_dot(a, b) for b in memory] for a in memory])
        )
        self.turned += bool(factors.any())
        for factor, gradient in zip(factors.tolist(), memory, strict=True):
            if factor:
                for mine, theirs in zip(own, gradient, strict=True):
                    mine.add_(theirs, alpha=factor)

    def report(self) -> dict[str, Any]:
        return {"gem": {"rows": sum(map(len, self.parts)), "steps_turned": self.turned}}


def turn(products: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each g_k is added to g.

    Args:
        products: ⟨g_k, g⟩, [parts].
        gram: ⟨g_k, g_j⟩, [parts, parts].

    Returns:
        v ≥ 0, [parts]; all zero where no product is negative.
    """
    from scipy.optimize import nnls

    if not (products < 0).any():
        return np.zeros(len(products))
    # ½ vᵀKv + bᵀv = ½‖Rv + R⁻ᵀb‖² + …, K = RᵀR by its eigenvectors; parts that say the same make K singular.
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * 1e-12
    root = np.sqrt(values[kept])
    found: NDArray[np.float64] = nnls(root[:, None] * vectors[:, kept].T, -(vectors[:, kept].T @ products) / root)[0]
    return found


def _dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return sum(float(torch.sum(a.double() * b.double())) for a, b in zip(one, other, strict=True))
