"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, Eq. 3): λ Σ F_i (θ_i − θ*_i)².

F is the diagonal of the Fisher information where the round begins, the mean over remembered rows of (∂ log p(row) / ∂θ_i)², and
θ* are the weights there. Remembered are the rows of older data and of earlier rounds, and own text. The gradient 2λ F (θ − θ*) is
added once a step. Cost: F in float32 and θ*, and a pass for every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.holds.memory import resting, some
from surgery.train.settings import Settings
from surgery.train.sharding import like


class Ewc(Hold):
    """The penalty.

    Args:
        weight: λ.
        most: rows of each part of the memory.
    """

    def __init__(self, weight: float, most: int) -> None:
        self.weight, self.most, self.rows = weight, most, 0
        self.start: dict[str, torch.Tensor] = {}
        self.fisher: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls(settings.ewc, settings.memory_rows) if settings.ewc else None

    def begin(self, scene: Scene) -> None:
        """Measure F where the round begins."""
        rows = [row for part in scene.memory for row in some(part, self.most, scene.seed)]
        self.rows, self.start, self.fisher = len(rows), {}, {}
        if not rows:
            return
        named = {name: p for name, p in scene.model.named_parameters() if p.requires_grad}
        self.start = {name: parameter.detach().clone() for name, parameter in named.items()}
        self.fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
        with resting(scene.model):
            for row in rows:
                loss, _ = scene.nll([row])
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for name, gradient in zip(named, found, strict=True):
                    if gradient is not None:
                        self.fisher[name].add_(gradient.float().square(), alpha=1 / len(rows))

    @torch.no_grad()
    def gradients(self, model: nn.Module) -> None:
        if not self.fisher:
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self.fisher:
                self.start[name] = like(self.start[name], parameter)
                self.fisher[name] = like(self.fisher[name], parameter)
                away = (parameter - self.start[name]) * self.fisher[name]
                parameter.grad.add_(away.to(parameter.dtype), alpha=2 * self.weight)

    def report(self) -> dict[str, Any]:
        return {"ewc": {"rows": self.rows}}
