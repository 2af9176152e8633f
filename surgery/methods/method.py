"""What the streaming loop and the command line know of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from surgery.checkpoint.item import Item
from surgery.methods.actions import Action


class Method(Protocol):
    """A method. Its dataclass fields are its parameters, and those that are options (`surgery.option`) are its command's.

    Attributes:
        name: of its command.
        help: of its command.
        about: what it is and where from, for the model card.
        merges: it takes several fine-tuned models.
        calibrated: it needs input norms, which `surgery.calibrate` measures.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    about: ClassVar[str]
    merges: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def label(self) -> str:
        """Name and main number, for the name of the output folder."""

    def plan(self, items: Sequence[Item]) -> list[Action]:
        """One action for each tensor of ft, in the items' order.

        Raises:
            OptionError: the parameters do not fit this model.
        """
