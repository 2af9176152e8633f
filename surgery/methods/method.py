"""The interface of a method to the streaming loop and the command line, and what all methods have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action
from surgery.methods.depth import depth, interpolated, layer_counts
from surgery.option import Declared, Option, declared_options, value_of


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"takes numbers with commas between them, such as 0.95,0.9,0.6, not {text!r}.") from None


DEPTH = Option(
    "The method's main number by depth, from the first layer to the last: two or more, such as 0.95,0.9,0.6, linear between. "
    "Embeddings take the first, final norm and head the last.",
    metavar="NUMBERS",
    shown=False,
    parse=_numbers,
)


@dataclass(frozen=True)
class Method:
    """A method. Its dataclass fields are its parameters, and those that are options (`surgery.option`) are its command's.

    Args:
        depth: the main number of the method (its first option that is swept) at evenly spaced depths from the first layer to the
            last, in its place; between them it is linear. None: the main number is the same everywhere.

    Attributes:
        name: of its command.
        help: of its command.
        about: what it is and where from, for the model card.
        merges: it takes several fine-tuned models.
        calibrated: it needs input norms, which `surgery.calibrate` measures.
        slow: an edit takes longer than to score a model on some items, so that a search tries it only where it is named.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    about: ClassVar[str]
    merges: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    depth: tuple[float, ...] = field(default=(), kw_only=True, metadata={"option": DEPTH})

    def label(self) -> str:
        """Name and main number, for the name of the output folder."""
        raise NotImplementedError

    def plan(self, items: Sequence[Item]) -> list[Action]:
        """One action for each tensor of ft, in the items' order, with the same main number everywhere.

        Raises:
            OptionError: the parameters do not fit this model.
        """
        raise NotImplementedError

    def title(self) -> str:
        """`label`, or the name and the numbers by depth."""
        return "-".join([self.name, "depth", *(f"{value:g}" for value in self.depth)]) if self.depth else self.label()

    def actions(self, items: Sequence[Item]) -> list[Action]:
        """`plan`, with the main number that each tensor's depth gives it.

        Raises:
            OptionError: the parameters do not fit this model, or each other.
        """
        if not self.depth:
            return self.plan(items)
        main, counts = main_option(type(self)), layer_counts(item.place for item in items)
        if len(self.depth) < 2:
            raise OptionError(
                "`depth` takes two or more numbers, from the first layer to the last, such as 0.95,0.9,0.6."
            )
        if value_of(self, main.name) != main.default:
            raise OptionError(f"`depth` says what `{main.name}` is: leave `{main.name}` out.")
        if not counts:
            raise OptionError("No tensor of ft belongs to a layer, so there is no depth to go by: leave `depth` out.")
        for value in self.depth:
            self._at(value)
        values = [interpolated(self.depth, depth(item.place, counts)) for item in items]
        plans = {value: self._at(value).plan(items) for value in set(values)}
        return [plans[value][number] for number, value in enumerate(values)]

    def _at(self, value: float) -> Method:
        """The method with a main number, everywhere.

        Raises:
            OptionError: it is no such number.
        """
        main = main_option(type(self))
        number: Any = value if main.option.parse is None else (value,)
        try:
            return replace(self, depth=(), **{main.name: number})
        except OptionError as error:
            raise OptionError(f"`depth`: {error}") from None


def swept_options(kind: type[Method]) -> list[Declared]:
    """The options of a method that a sweep varies, the main one first."""
    return [one for one in declared_options(kind) if one.option.swept]


def main_option(kind: type[Method]) -> Declared:
    """The option of a method whose number a sweep changes."""
    return swept_options(kind)[0]
