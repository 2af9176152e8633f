"""The setting that meets a limit and is best otherwise (`surgery sweep --choose`).

    forgetting<=x   of the settings that forget no more than x, the one that keeps most of the task
    retention>=x    of the settings that keep at least x of the task, the one that forgets least

Along one number, such as a sparsity, both scores mostly rise or fall, and the best setting lies where the limit is just met. The
ends, the middle and the quarters are scored first. Where they are monotone enough, the limit's place is found by bisection.
Monotone enough means that the limit is met on one side only, and that neither score ever turns back by more than a tenth of its
whole range. Otherwise, and where settings differ in more than one number, the whole grid is scored. A turn between two settings
that were scored is not noticed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

from surgery.comparison.grid import coarse_to_fine
from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.comparison.compare import Outcome

FIRST = 5  # settings that are scored before it is decided how to go on
TURN = 0.1
FORM = re.compile(r"\s*(?:(forgetting)\s*<=|(retention)\s*>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Limit:
    """What a setting has to meet.

    Attributes:
        score: "forgetting", which must not be more than the bound, or "retention", not less.
        bound: the number; both scores are shares, so 0.01 is one point.
    """

    score: Literal["forgetting", "retention"]
    bound: float

    def __str__(self) -> str:
        return f"{self.score}{'<=' if self.score == 'forgetting' else '>='}{self.bound:g}"

    @property
    def other(self) -> Literal["forgetting", "retention"]:
        """The score that is to be best."""
        return "retention" if self.score == "forgetting" else "forgetting"

    def excess(self, outcome: Outcome) -> float:
        """By how much an outcome misses the limit; 0 or less where it is met, inf where the score is not defined."""
        value = getattr(outcome, self.score)
        if value is None:
            return math.inf
        return float(value - self.bound if self.score == "forgetting" else self.bound - value)

    def met(self, outcome: Outcome) -> bool:
        """Whether an outcome is within the limit."""
        return self.excess(outcome) <= 0

    def merit(self, outcome: Outcome) -> float:
        """The other score, such that more is better; −inf where it is not defined."""
        value = getattr(outcome, self.other)
        if value is None:
            return -math.inf
        return float(value if self.other == "retention" else -value)

    def sure(self, outcome: Outcome) -> str:
        """What the score's 95% interval says of the limit, as half a sentence."""
        interval = getattr(outcome, f"{self.score}_interval")
        if interval is None:
            return f"{self.score} has no interval on these items"
        low, high = interval
        text = f"the 95% interval of {self.score} is {low:.4f} to {high:.4f}"
        worst = high - self.bound if self.score == "forgetting" else self.bound - low
        if worst <= 0:
            return f"{text}, all within the limit"
        return f"{text}, so with other items it may not hold"


def parse_limit(text: str) -> Limit:
    """The limit that "forgetting<=0.01" or "retention>=0.99" means.

    Raises:
        OptionError: it is neither.
    """
    found = FORM.fullmatch(text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if not found or not math.isfinite(bound):
        raise OptionError(f'`choose` takes "forgetting<=0.01" or "retention>=0.99", not {text!r}.')
    return Limit("forgetting" if found[1] else "retention", bound)


@dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        best: the position of the setting; None where no setting that was tried meets the limit.
        nearest: of the one that misses it least.
        tried: the outcomes by position.
        bisected: whether positions were left out because the scores are monotone.
    """

    best: int | None
    nearest: int
    tried: dict[int, Outcome]
    bisected: bool


def choose(
    count: int, outcome: Callable[[int], Outcome], limit: Limit, *, line: bool, most: int | None = None
) -> Choice:
    """Find the setting that meets a limit and is best otherwise.

    Args:
        count: of settings, one or more.
        outcome: scores the one at a position.
        line: the positions are along one number.
        most: where the scores are not monotone, so many settings are tried at most, from coarse to fine.
    """
    tried: dict[int, Outcome] = {}

    def at(place: int) -> bool:
        if place not in tried:
            tried[place] = outcome(place)
        return limit.met(tried[place])

    order = coarse_to_fine(count)
    for place in order[: FIRST if line else most]:
        at(place)
    if line and _monotone(tried, limit):
        while gap := _boundary(tried, limit):
            low, high = gap
            at((low + high) // 2)
    bisected = line and len(tried) < count and _monotone(tried, limit)
    if line and not bisected:
        for place in order[:most]:
            at(place)
    best = max(
        (place for place in tried if at(place)),
        key=lambda place: (limit.merit(tried[place]), -limit.excess(tried[place])),
        default=None,
    )
    nearest = min(tried, key=lambda place: limit.excess(tried[place]))
    return Choice(best, nearest, tried, bisected)


def _boundary(tried: dict[int, Outcome], limit: Limit) -> tuple[int, int] | None:
    """Two positions with others between them, of which one meets the limit."""
    for low, high in pairwise(sorted(tried)):
        if high - low > 1 and limit.met(tried[low]) != limit.met(tried[high]):
            return low, high
    return None


def _monotone(tried: dict[int, Outcome], limit: Limit) -> bool:
    """Whether the limit is met on one side only, and both scores go one way but for little."""
    outcomes = [tried[place] for place in sorted(tried)]
    if sum(limit.met(one) != limit.met(other) for one, other in pairwise(outcomes)) > 1:
        return False
    return all(_one_way([getattr(one, name) for one in outcomes]) for name in ("forgetting", "retention"))


def _one_way(values: list[Any]) -> bool:
    if None in values:
        return False
    if values[0] > values[-1]:
        values = [-value for value in values]
    turned = max(top - value for top, value in zip(accumulate(values, max), values, strict=True))
    return bool(turned <= TURN * (max(values) - min(values)))
