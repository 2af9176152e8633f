"""Penalties on the distance from the start θ0.

    L1       λ ‖θ − θ0‖₁          gradient λ · sign(θ − θ0)
    L2       λ ‖θ − θ0‖₂²         gradient 2λ (θ − θ0)

Their gradients are added once a step, before clipping, and over all weights that are trained; the loss that is shown is
without them. With LoRA θ − θ0 is s · B A, and the gradient goes on to the factors: of L2 by their Gram matrices, of L1 by one
whole matrix at a time. Cost: θ0 once more in memory, with LoRA nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.settings import Settings
from surgery.train.sharding import like, whole


class Distance(Hold):
    """The penalties on a model's own weights.

    Args:
        l1, l2: λ of each.
    """

    def __init__(self, l1: float, l2: float) -> None:
        self.l1, self.l2 = l1, l2
        self.start: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        if not settings.l1 and not settings.l2:
            return None
        return (cls if settings.lora is None else LowRank)(settings.l1, settings.l2)

    def begin(self, scene: Scene) -> None:
        """Keep the weights, where this is the first round."""
        if scene.number == 1:
            self.start = {name: parameter.detach().clone() for name, parameter in scene.model.named_parameters()}

    @torch.no_grad()
    def gradients(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            self.start[name] = like(self.start[name], parameter)
            away = parameter - self.start[name]
            if self.l2:
                parameter.grad.add_(away, alpha=2 * self.l2)
            if self.l1:
                parameter.grad.add_(away.sign_(), alpha=self.l1)


class LowRank(Distance):
    """The penalties on what LoRA adds to each matrix, s · B A."""

    def begin(self, scene: Scene) -> None:
        """Nothing is kept: what LoRA adds is the distance."""

    @torch.no_grad()
    def gradients(self, model: nn.Module) -> None:
        for scale, first, second in _factors(model):
            a, b = whole(first).float(), whole(second).float()
            if self.l2:
                _add(first, b.T @ b @ a, 2 * self.l2 * scale**2)
                _add(second, b @ (a @ a.T), 2 * self.l2 * scale**2)
            if self.l1:
                signs = (b @ a).sign_()
                _add(first, b.T @ signs, self.l1 * abs(scale))
                _add(second, signs @ a.T, self.l1 * abs(scale))


def _factors(model: nn.Module) -> Iterator[tuple[float, nn.Parameter, nn.Parameter]]:
    """s, A [r, in] and B [out, r] of every matrix that LoRA adapts."""
    for module in model.modules():
        layer: Any = module
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            for name in layer.lora_A:
                yield layer.scaling[name], layer.lora_A[name].weight, layer.lora_B[name].weight


def _add(parameter: nn.Parameter, gradient: torch.Tensor, factor: float) -> None:
    """Add to a parameter's gradient; one without any is frozen."""
    if parameter.grad is not None:
        parameter.grad.add_(like(gradient.to(parameter.dtype), parameter), alpha=factor)
