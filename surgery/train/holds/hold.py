"""The interface of a hold, which keeps a training near its start: it acts before a round, in a pass, and around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.train.encode import Encoded
from surgery.train.settings import Settings

# input_ids, attention_mask and labels on the model's device, int64 [rows, length].
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scene:
    """The state before the first step of a round.

    Attributes:
        model: to be trained; what is frozen in this round has no gradient. Not yet sharded.
        rows: of the round.
        memory: what came before: the rows of each older file and of each earlier round, and own text, each a list.
        batch: pads rows to a batch.
        nll: Σ −log p of the learnt tokens of some rows, and how many they are, by the model as it is then.
        steps: of the round.
        number: of the round, from 1.
        seed: of the round.
    """

    model: nn.Module
    rows: Sequence[Encoded]
    memory: Sequence[Sequence[Encoded]]
    batch: Callable[[Sequence[Encoded]], Batch]
    nll: Callable[[Sequence[Encoded]], tuple[torch.Tensor, int]]
    number: int
    seed: int
    steps: int = 0


class Hold:
    """One way to stay near the start. Each does something at some of these places, and nothing at the others."""

    @classmethod
    def of(cls, settings: Settings) -> Hold | None:
        """The hold that the settings ask for; None where they do not."""
        raise NotImplementedError

    def begin(self, scene: Scene) -> None:
        """Prepare for a round; the model's weights are the same afterwards."""

    @contextmanager
    def passing(self, model: nn.Module) -> Iterator[None]:
        """A context around a pass through the model and back."""
        yield

    def gradients(self, model: nn.Module) -> None:
        """Change the gradients of a step, all parts of its batch together, before they are clipped."""

    def stepped(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights after the optimizer did."""

    def report(self) -> dict[str, Any]:
        """Its part of the report of a round."""
        return {}
