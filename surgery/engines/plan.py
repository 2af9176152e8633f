"""One unit of work: a tensor of ft, its base, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.actions import Action
from surgery.checkpoint.tensor import Tensor
from surgery.layout import Place


@dataclass(frozen=True, slots=True)
class Step:
    """A tensor to write; pre is None where only ft has the tensor.

    Where fine-tuning added rows to the vocabulary, pre has fewer rows than ft: those are edited, the others are ft's.
    `others` are the like tensors of further fine-tuned models, for a merge, with as many rows as pre has.
    """

    ft: Tensor
    pre: Tensor | None
    place: Place
    action: Action
    others: tuple[Tensor, ...] = ()

    @property
    def shared(self) -> Tensor:
        """The part of ft that pre has too."""
        return self.ft if self.pre is None or self.pre.shape == self.ft.shape else self.ft.rows(0, self.pre.shape[0])

    @property
    def added(self) -> Tensor | None:
        """The rows that only ft has, if there are any."""
        if self.pre is None or self.pre.shape == self.ft.shape:
            return None
        return self.ft.rows(self.pre.shape[0], self.ft.shape[0])
