"""One unit of work: a tensor of ft, its base, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.actions import Action
from surgery.checkpoint.header import Tensor
from surgery.layout import Place


@dataclass(frozen=True, slots=True)
class Step:
    """A tensor to write. `shard` is the file of the output that holds it; pre is None where only ft has the tensor."""

    ft: Tensor
    pre: Tensor | None
    place: Place
    action: Action
    shard: str
