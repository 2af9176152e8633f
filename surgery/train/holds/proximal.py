"""Proximal gradient descent: the L2 pull towards the start θ0 as a step of its own, behind the optimizer's.

    θ ← argmin ½‖x − θ‖² + η λ‖x − θ0‖² = (θ + 2ηλ θ0) / (1 + 2ηλ),  η the step's learning rate

Other than L2 (`surgery.train.holds.distance`) it does not go through the optimizer's moments. Cost: θ0 once more in memory.
"""

from __future__ import annotations

import torch
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.settings import Settings
from surgery.train.sharding import like


class Proximal(Hold):
    """The step.

    Args:
        weight: λ.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.start: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls(settings.proximal) if settings.proximal else None

    def begin(self, scene: Scene) -> None:
        """Keep the weights, where this is the first round."""
        if scene.number == 1:
            self.start = {name: parameter.detach().clone() for name, parameter in scene.model.named_parameters()}

    @torch.no_grad()
    def stepped(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            start = self.start[name] = like(self.start[name], parameter)
            pull = 2 * float(rates[id(parameter)]) * self.weight
            parameter.add_(start, alpha=pull).div_(1 + pull)
