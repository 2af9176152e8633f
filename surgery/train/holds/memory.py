"""Some rows of each part of what came before, and the gradient of a loss on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from surgery.train.encode import Encoded
from surgery.train.holds.hold import Scene

TOGETHER = 8  # rows in a pass


def some(rows: Sequence[Encoded], most: int, seed: int) -> list[Encoded]:
    """At most so many rows, drawn at random, in their order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(most, len(rows)))
    return [rows[place] for place in sorted(chosen)]


def mean_gradient(scene: Scene, rows: Sequence[Encoded], trained: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """The gradient of the mean negative log-likelihood of the rows' learnt tokens. No parameter's own gradient changes."""
    total, count = [torch.zeros_like(parameter) for parameter in trained], 0
    for begin in range(0, len(rows), TOGETHER):
        loss, tokens = scene.nll(rows[begin : begin + TOGETHER])
        count += tokens
        # Not backward(): the hooks of distributed training must not see this pass.
        for sum, found in zip(total, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if found is not None:
                sum.add_(found)
    return [sum.div_(max(count, 1)) for sum in total]


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """A context in which nothing is dropped at random."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
