"""The methods, one file each. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, Protocol

from surgery.checkpoint.item import Item
from surgery.methods.actions import Action
from surgery.methods.dare import Dare
from surgery.methods.fapm import Fapm
from surgery.methods.half_reset import HalfReset
from surgery.methods.hma import Hma
from surgery.methods.magnitude import Magnitude
from surgery.methods.ties import Ties
from surgery.methods.wanda import Wanda


class Method(Protocol):
    """What the streaming loop knows of a method. Its dataclass fields are its parameters.

    `about` says what it is and where from, for the model card.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    def label(self) -> str:
        """Name and main number, for the name of the output folder."""

    def plan(self, items: Sequence[Item]) -> list[Action]:
        """One action for each tensor of ft, in the items' order.

        Raises:
            OptionError: the parameters do not fit this model.
        """


def parameters(method: Method) -> dict[str, Any]:
    """A method's parameters, for the report; what was measured for it is not among them."""
    everything: dict[str, Any] = {
        entry.name: getattr(method, entry.name)
        for entry in fields(method)  # type: ignore[arg-type]
        if entry.metadata.get("parameter", True)
    }
    return {name: asdict(value) if is_dataclass(value) else value for name, value in everything.items()}  # type: ignore[arg-type]


__all__ = [
    "MERGES",
    "METHODS",
    "Dare",
    "Fapm",
    "HalfReset",
    "Hma",
    "Magnitude",
    "Method",
    "Ties",
    "Wanda",
    "parameters",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Fapm, Magnitude, HalfReset, Hma, Ties, Dare, Wanda)
}
# Those that take several fine-tuned models.
MERGES = (Ties, Dare)
