"""Losses of a token in place of its negative log-likelihood −log p(y).

    dft    −log p(y) · p(y), the factor detached                                       (arXiv 2508.05629; TRL computes it)
    eaft   −log p(y) · (H / 3)^α, H the entropy of the 20 largest logits, detached     (arXiv 2601.02151)
    asft   dft + λ · KL(θ0 ‖ θ) over the vocabulary                                    (arXiv 2509.23753)
    kl     −log p(y) + λ · KL(θ0 ‖ θ)

θ0 is the start model. With LoRA that is the model without its adapter; else it is in memory a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

TOP, SCALE = 20, 3.0  # of EAFT: the logits that it looks at, and about the largest entropy that they can have, ln 20


@dataclass(frozen=True)
class Strength:
    """How strong a loss is.

    Attributes:
        alpha: α of eaft.
        weight: λ of asft and kl.
    """

    alpha: float = 1.0
    weight: float = 0.05


NORMAL = Strength()

# Logits [tokens, vocabulary], labels int64 [tokens], the start model's logits or None -> the loss of each token, [tokens].
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Strength], torch.Tensor]


def dft(logits: torch.Tensor, labels: torch.Tensor, start: torch.Tensor | None, strength: Strength) -> torch.Tensor:
    """−log p(y) · p(y)."""
    loss = cross_entropy(logits, labels, reduction="none")
    return loss * (-loss).exp().detach()


def eaft(logits: torch.Tensor, labels: torch.Tensor, start: torch.Tensor | None, strength: Strength) -> torch.Tensor:
    """−log p(y) · (H / 3)^α, where a token at which the model is sure teaches little."""
    with torch.no_grad():
        logs = log_softmax(logits.topk(min(TOP, logits.shape[-1])).values, -1)
        entropy = -(logs.exp() * logs).sum(-1)
    return cross_entropy(logits, labels, reduction="none") * (entropy / SCALE) ** strength.alpha


def asft(logits: torch.Tensor, labels: torch.Tensor, start: torch.Tensor | None, strength: Strength) -> torch.Tensor:
    """dft + λ · KL(θ0 ‖ θ)."""
    return dft(logits, labels, None, strength) + strength.weight * divergence(start, logits)


def kl(logits: torch.Tensor, labels: torch.Tensor, start: torch.Tensor | None, strength: Strength) -> torch.Tensor:
    """−log p(y) + λ · KL(θ0 ‖ θ)."""
    return cross_entropy(logits, labels, reduction="none") + strength.weight * divergence(start, logits)


def divergence(start: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """KL(θ0 ‖ θ) of each token, over the vocabulary."""
    assert start is not None
    pair = log_softmax(logits, -1), log_softmax(start.to(logits.dtype), -1)
    return kl_div(*pair, log_target=True, reduction="none").sum(-1)


# Those that the trainer has by itself are not here.
LOSSES: Mapping[str, Loss] = {"eaft": eaft, "asft": asft, "kl": kl}
# Those that ask the start model.
ASKING = ("asft", "kl")
