"""AdaLoRA's own part in a training: ranks that are given out anew in each step (Zhang et al. 2023, arXiv 2303.10512).

    the loss gets  γ · mean over matrices of ‖P Pᵀ − I‖_F and ‖Qᵀ Q − I‖_F   (its Eq. 4, with peft's norm and γ = 0.5)

peft adds that to the loss that a model computes itself, which the trainer does not use, and leaves the call that allocates to the
training loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.train.holds.hold import Hold, Scene
from surgery.train.settings import Settings


class AdaLora(Hold):
    """The allocation, by peft, and the regularisation."""

    def __init__(self) -> None:
        self.step = 0

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        return cls() if (settings.peft or "").upper() == "ADALORA" else None

    def begin(self, scene: Scene) -> None:
        tuner: Any = scene.model.base_model
        tuner.rankallocator.set_total_step(scene.steps)
        self.step = 0

    def gradients(self, model: nn.Module) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.grad is not None and ("lora_A" in n or "lora_B" in n)]
        with torch.enable_grad():
            total = torch.zeros((), device=named[0][1].device)
            for name, factor in named:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                total = total + torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            tuner: Any = model.base_model
            weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
            found = torch.autograd.grad(weight * total / len(named), [factor for _, factor in named])
        for (_, factor), gradient in zip(named, found, strict=True):
            assert factor.grad is not None
            factor.grad.add_(gradient)

    def stepped(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.step += 1
        tuner: Any = model.base_model
        tuner.update_and_allocate(self.step)

    def report(self) -> dict[str, Any]:
        return {"adalora": {"steps": self.step}}
