"""Several measures as one, whose score is the mean of theirs: averages of groups are averaged, not all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import OptionError
from surgery.evaluation.scores import Counted, Kind, Measure, Scores

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel


@dataclass(eq=False)
class Group:
    """The measure. Its items are those of its members, with weights such that their mean is the mean of the members' scores.

    Attributes:
        members: all of them shares of right answers, or the like.

    Raises:
        OptionError: one is not.
    """

    name: str
    members: Sequence[Measure] = field(repr=False)
    kind: Kind = field(default="share", init=False)
    settings: dict[str, Any] = field(init=False)
    _counted: list[Counted] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._counted = [one for one in self.members if isinstance(one, Counted) and one.kind == "share"]
        if len(self._counted) < len(self.members):
            other = next(one for one in self.members if one not in self._counted)
            raise OptionError(
                f"{self.name}: its member {other.name} is a {other.kind}, and only shares of right answers can be averaged in a "
                "group. Name it outside of the group, or choose another metric for it."
            )
        self.settings = {
            "measure": "group",
            "members": [one.name for one in self.members],
            "each": [one.settings for one in self.members],
        }

    @property
    def count(self) -> int:
        """How many items the members have together."""
        return sum(one.count for one in self._counted)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model.

        Returns:
            Scores whose `extra` has each member's, as "NAME: value".
        """
        chosen = range(self.count) if only is None else only
        values, weights = np.zeros(len(chosen)), np.zeros(len(chosen))
        items: list[dict[str, Any]] = [{}] * len(chosen)
        extra: dict[str, float] = {}
        first = done = 0
        for one in self._counted:
            places = [at for at, place in enumerate(chosen) if first <= place < first + one.count]
            if places:
                found = one.score(
                    model,
                    partial(_advance, advance, done, len(chosen)),
                    None if only is None else [chosen[at] - first for at in places],
                )
                # All items of a member together weigh as much as those of another one.
                whole = found.weights.mean() * one.count
                values[places] = found.values
                weights[places] = found.weights / whole * self.count / len(self._counted)
                for at, item in zip(places, found.items or [{}] * len(places), strict=True):
                    items[at] = {"measure": one.name} | item
                extra |= {f"{one.name}: value": found.value} if only is None else {}
            first, done = first + one.count, done + len(places)
        return Scores(self.kind, values, weights, items, extra)


def _advance(advance: Advance, before: int, whole: int, done: int, _: int) -> None:
    """Tell how far a member is, as part of all items."""
    advance(before + done, whole)
