"""V-SoftMask: the gradients of units that matter for general knowledge are made smaller (Ke et al. 2023, arXiv 2302.03241, §3).

    ∇'_u = (1 − I_u) ∇_u,   I = |tanh(normalised ī)|,   ī_u = mean over rows of |∂L / ∂g_u|

A unit u is an output of a matrix of attention or feed-forward, g_u = 1 a factor on it, and L a proxy of general knowledge: the
KL between two passes over the round's rows in which outputs are dropped at random. ī is normalised over each matrix, to mean 0
and variance 1. The authors have units of attention by head; here they are its outputs one by one. Current models drop nothing by
themselves, so that each matrix's outputs are dropped with probability 0.1. Cost: two passes over the rows before a round, and a
number a unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout

from surgery.errors import OptionError
from surgery.layout import place
from surgery.train.holds.hold import Batch, Hold, Scene
from surgery.train.holds.memory import TOGETHER, resting, some
from surgery.train.losses import divergence
from surgery.train.settings import Settings
from surgery.train.sharding import like

DROPPED = 0.1


class SoftMask(Hold):
    """The mask.

    Args:
        most: rows that the importance is measured on.
    """

    def __init__(self, most: int) -> None:
        self.most, self.rows = most, 0
        self.kept: dict[str, torch.Tensor] = {}  # name of a parameter -> 1 − I, in a shape that its gradient takes

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls(settings.memory_rows) if settings.soft_mask or settings.cofitune else None

    def begin(self, scene: Scene) -> None:
        """Measure the units' importance where the round begins.

        Raises:
            OptionError: the model has no such matrix.
        """
        found = dict(matrices(scene.model))
        if not found:
            raise OptionError("The model has no matrix of attention or feed-forward to `soft_mask`. Leave it out.")
        rows = some(scene.rows, self.most, scene.seed)
        self.rows = len(rows)
        sums = {name: torch.zeros(outputs(module)[1], device=module.weight.device) for name, module in found.items()}
        with resting(scene.model), torch.random.fork_rng():
            torch.manual_seed(scene.seed)
            for begin in range(0, len(rows), TOGETHER):
                some_rows = rows[begin : begin + TOGETHER]
                for name, gradient in _sensitivity(scene.model, found, scene.batch(some_rows)).items():
                    sums[name] += gradient.abs() * len(some_rows)
        self.kept = {}
        for name, module in found.items():
            kept = 1 - importance(sums[name] / len(rows))
            dim, size = outputs(module)
            self.kept[f"{name}.weight"] = kept.view(size, 1) if dim == 0 else kept.view(1, size)
            if getattr(module, "bias", None) is not None:
                self.kept[f"{name}.bias"] = kept

    @torch.no_grad()
    def gradients(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            kept = self.kept.get(name)
            if parameter.grad is not None and kept is not None:
                spread = type(parameter.data) is not torch.Tensor  # a DTensor takes factors of its own kind only
                factor = like(kept.expand(parameter.shape), parameter) if spread else kept
                parameter.grad.mul_(factor)

    def report(self) -> dict[str, Any]:
        return {"soft_mask": {"rows": self.rows}}


def importance(sensitivity: torch.Tensor) -> torch.Tensor:
    """|tanh| of the units' numbers at mean 0 and variance 1; zero where all are the same."""
    spread = sensitivity.std(unbiased=False)
    return (
        torch.tanh((sensitivity - sensitivity.mean()) / spread).abs() if spread > 0 else torch.zeros_like(sensitivity)
    )


def matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of attention and feed-forward in layers that have a matrix with something to train, by name."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        where = place(f"{name}.weight")
        inside = where.layer is not None and where.category in ("attention", "feed_forward")
        if inside and isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.requires_grad:
            yield name, module


def outputs(module: Any) -> tuple[int, int]:
    """The dimension of a matrix along which its outputs lie, and how many they are: GPT-2's Conv1D stores [in, out]."""
    dim = 1 if type(module).__name__ == "Conv1D" else 0
    return dim, int(module.weight.shape[dim])


def _sensitivity(model: nn.Module, found: dict[str, Any], batch: Batch) -> dict[str, torch.Tensor]:
    """∂L / ∂g of every unit, the mean over the batch's tokens."""
    factors = {
        name: torch.ones(outputs(module)[1], device=module.weight.device, requires_grad=True)
        for name, module in found.items()
    }
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    seen = (
        inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"]).bool()
    )
    with ExitStack() as hooks, torch.enable_grad():
        for name, module in found.items():

            def changed(_: Any, __: Any, output: torch.Tensor, factor: torch.Tensor = factors[name]) -> torch.Tensor:
                return dropout(output * factor.to(output.dtype), DROPPED)

            hooks.callback(module.register_forward_hook(changed).remove)
        one, other = (model(**inputs, use_cache=False).logits[seen].float() for _ in range(2))
        loss = divergence(one, other).mean()
        gradients = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(factors[name]) if gradient is None else gradient
        for name, gradient in zip(factors, gradients, strict=True)
    }
