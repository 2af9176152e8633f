"""Mixout: in each pass, each entry of a matrix is θ0's with probability p (Lee, Cho & Kang, arXiv 1909.11299, Eq. 6).

    (M θ0 + (1 − M) θ − p θ0) / (1 − p),  M drawn anew in each pass

Vectors (norms and biases) are left alone. Cost: θ0, θ and a mask once more in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.settings import Settings
from surgery.train.sharding import like


class Mixout(Hold):
    """The mixture.

    Args:
        probability: p, below 1.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.start: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls(settings.mixout) if settings.mixout else None

    def begin(self, scene: Scene) -> None:
        """Keep the matrices, where this is the first round."""
        if scene.number == 1:
            named = scene.model.named_parameters()
            self.start = {name: parameter.detach().clone() for name, parameter in named if parameter.ndim > 1}

    @contextmanager
    def passing(self, model: nn.Module) -> Iterator[None]:
        """A context in which the weights are mixed, and gradients reach only the entries that are θ's."""
        undo, share = [], self.probability
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or name not in self.start:
                continue
            start = self.start[name] = like(self.start[name], parameter)
            own = parameter.data
            taken = torch.rand_like(own, dtype=torch.float32) < share
            parameter.data = torch.where(taken, start, own).sub_(start, alpha=share).div_(1 - share)
            hook = parameter.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient, taken=taken: gradient.masked_fill(taken, 0).div_(1 - share)
            )
            undo.append((parameter, own, hook))
        try:
            yield
        finally:
            for parameter, own, hook in undo:
                parameter.data = own
                hook.remove()
