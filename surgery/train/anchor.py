"""Keep a training near its start θ0: the penalties L1 and L2, and mixout.

    L1       λ ‖θ − θ0‖₁          gradient λ · sign(θ − θ0)
    L2       λ ‖θ − θ0‖₂²         gradient 2λ (θ − θ0)
    mixout   in each pass, each entry of a matrix is θ0's with probability p: (M θ0 + (1 − M) θ − p θ0) / (1 − p)
             (Lee, Cho & Kang, "Mixout", arXiv 1909.11299, Eq. 6)

The penalties' gradients are added once a step, before clipping, and over all weights that are trained; the loss that is shown is
without them. Mixout leaves vectors (norms and biases) alone. Cost: θ0 once more in memory, for mixout θ and a mask too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from surgery.train.sharding import like


class Anchor:
    """θ0 and the strength of each pull towards it.

    Args:
        model: at θ0; what is not trained is not kept.
    """

    def __init__(self, model: nn.Module, l1: float = 0.0, l2: float = 0.0, mixout: float = 0.0) -> None:
        self.l1, self.l2, self.mixout = l1, l2, mixout
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def _trained(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.start[name] = like(self.start[name], parameter)
                yield parameter, self.start[name]

    @torch.no_grad()
    def pull(self, model: nn.Module) -> None:
        """Add the penalties' gradients."""
        if not self.l1 and not self.l2:
            return
        for parameter, start in self._trained(model):
            if parameter.grad is None:
                continue
            away = parameter - start
            if self.l2:
                parameter.grad.add_(away, alpha=2 * self.l2)
            if self.l1:
                parameter.grad.add_(away.sign_(), alpha=self.l1)

    @contextmanager
    def mixed(self, model: nn.Module) -> Iterator[None]:
        """A context in which the weights are mixed, and gradients reach only the entries that are θ's."""
        if not self.mixout:
            yield
            return
        undo = []
        for parameter, start in self._trained(model):
            if parameter.ndim < 2:
                continue
            own = parameter.data
            taken = torch.rand_like(own, dtype=torch.float32) < self.mixout
            parameter.data = torch.where(taken, start, own).sub_(start, alpha=self.mixout).div_(1 - self.mixout)
            hook = parameter.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient, taken=taken: gradient.masked_fill(taken, 0).div_(1 - self.mixout)
            )
            undo.append((parameter, own, hook))
        try:
            yield
        finally:
            for parameter, own, hook in undo:
                parameter.data = own
                hook.remove()
