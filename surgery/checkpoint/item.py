"""A tensor of ft with its base: what a method decides on."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.checkpoint.tensor import Tensor
from surgery.layout import Place


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of ft, its place in the model, and its base in pre (None where only ft has it).

    Of a vocabulary that is larger on one side the base is the rows that both have: pre's shape may be smaller than ft's.
    """

    ft: Tensor
    pre: Tensor | None
    place: Place

    @property
    def editable(self) -> bool:
        """Whether a method may touch it: paired, floating point, and of a known category."""
        return self.pre is not None and self.ft.is_float and self.place.category != "other"
