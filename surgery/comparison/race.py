"""A race of many candidates on few items: who falls out, and how many items the others see next.

Each round scores the candidates that are left on more items, on which they are compared pair by pair; the better half
goes on (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943). Two kinds of candidates fall out at once:
those that are surely dominated, where another keeps more of the task and forgets less, and those that are surely
beyond the limit. "Surely" is a one-sided t-test at 5% that is divided by the number of comparisons of the round.
Along one number of a method neighbours inform each other: the half that goes on is chosen by smoothed scores.

A model that is just within a limit cannot be proved to be within it, and on a few items one that is well within it may seem to
be beyond. So those that go on are taken in turn from several orders of merit: with the limit as it is, drawn in by as much as a
proof will need, and, while there are many, eased by what chance may have done.

Nothing here proves anything of the winner, since it was chosen on these items: `surgery.comparison.proof` does, on
others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from surgery.comparison.proof import LEVEL, Drop
from surgery.errors import OptionError
from surgery.evaluation.scores import Floats
from surgery.text import share

FINALISTS = 4
# By how many standard errors of the proof the limit is drawn in: 1.64 for the test's level, the rest for its power.
MARGINS = (2.5, 1.2, 0.0)
# In the first rounds also: it is eased by one standard error of what was seen so far, which may have been bad luck.
HOPE = -1.0


@dataclass(frozen=True)
class Goal:
    """The limit that the winner must meet, and what is made best within it.

    Attributes:
        limit: "forgetting", of which there may be `bound` at most, and most retention wins; "retention", of which there must be
            `bound` at least, and least forgetting wins; or "knee": the best trade-off, see `merit`.
        bound: a share: 0.01 is one point of accuracy or one percent of likelihood.
    """

    limit: Literal["forgetting", "retention", "knee"]
    bound: float = 0.0

    def __str__(self) -> str:
        if self.limit == "knee":
            return "the best trade-off"
        return (
            f"forgets at most {share(self.bound, 2)}"
            if self.limit == "forgetting"
            else f"keeps at least {share(self.bound, 2)}"
        )

    @property
    def most(self) -> float:
        """How large the limited drop may be: forgetting, or the lost share of the task."""
        return self.bound if self.limit == "forgetting" else 1 - self.bound

    def within(self, lost: float, forgot: float) -> bool:
        """Whether a model meets the limit; any does where there is none."""
        return self.limit == "knee" or (forgot if self.limit == "forgetting" else lost) <= self.most

    def merit(self, lost: float, forgot: float, scale: tuple[float, float]) -> float:
        """How good a model is, more is better: those within the limit before all others, which follow by their excess.

        The knee is the model that keeps most of what fine-tuning gained and undoes most of what it forgot, both as shares:
        1 − lost / scale[0] + 1 − forgot / scale[1], which is 1 for pre and for ft.

        Args:
            lost: the share of ft's task score that is gone.
            forgot: of the general score.
            scale: pre's `lost` and ft's `forgot`.
        """
        if self.limit == "knee":
            return -sum(drop / whole for drop, whole in zip((lost, forgot), scale, strict=True) if whole > 0)
        limited, other = (forgot, lost) if self.limit == "forgetting" else (lost, forgot)
        return -other if limited <= self.most else -1e6 - limited


def wanted(max_forgetting: float | None, min_retention: float | None) -> Goal:
    """The goal that these limits mean, of which one at most is given.

    Raises:
        OptionError: both are given, or one is no share.
    """
    if max_forgetting is not None and min_retention is not None:
        raise OptionError(
            "Give `max_forgetting` or `min_retention`, not both: one is the limit, the other is made best."
        )
    if max_forgetting is not None:
        return Goal("forgetting", _share("max_forgetting", max_forgetting))
    if min_retention is not None:
        return Goal("retention", _share("min_retention", min_retention))
    return Goal("knee")


def parse_goal(text: str) -> Goal:
    """The goal that "forgetting<=0.01" or "retention>=0.99" means.

    Raises:
        OptionError: it is neither.
    """
    found = re.fullmatch(r"\s*(?:(forgetting)\s*<=|(retention)\s*>=)\s*(\S+)\s*", text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if not found or not math.isfinite(bound):
        raise OptionError(f'`choose` takes "forgetting<=0.01" or "retention>=0.99", not {text!r}.')
    return Goal("forgetting" if found[1] else "retention", bound)


@dataclass(frozen=True, eq=False)
class Standing:
    """The scores of a candidate so far, as drops.

    Attributes:
        lost: one drop from ft for each task.
        forgot: one drop from pre for each general measure.
        line: what the candidates have in common that differ in `place` alone; None where there is no such number.
        place: that number.
    """

    lost: Sequence[Drop]
    forgot: Sequence[Drop]
    line: Hashable | None = None
    place: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One of the two drops of all candidates, on the same items.

    Attributes:
        values: float64 [candidates].
        influences: for each measure float64 [candidates, items].
    """

    values: Floats
    influences: list[Floats]

    @staticmethod
    def of(columns: Sequence[Sequence[Drop]]) -> Axis:
        """The axis of candidates whose drops are given, [candidates][measures]."""
        found = [[drop.influence() for drop in drops] for drops in columns]
        values = np.array([np.mean([drop[0] for drop, _ in row]) for row in found])
        measures = range(len(columns[0]))
        return Axis(values, [np.concatenate([row[number][1] for row in found]) for number in measures])

    def errors(self, minus: int | None = None) -> Floats:
        """The standard error of each value, or of its difference from that of one candidate, [candidates]."""
        squared = np.zeros(len(self.values))
        for influence in self.influences:
            difference = influence if minus is None else influence - influence[minus]
            count = difference.shape[1]
            squared += (difference**2).sum(1) / max(count - 1, 1) / count
        return np.sqrt(squared) / len(self.influences)

    @property
    def freedom(self) -> int:
        """Degrees of freedom: of the measure with the fewest items."""
        return max(1, min(int(influence.shape[1]) for influence in self.influences) - 1)


def sift(
    standings: Mapping[str, Standing], goal: Goal, scale: tuple[float, float], keep: int, *, ahead: float = 0.0
) -> tuple[list[str], dict[str, str]]:
    """The candidates that go on, the best first, and why each of the others falls out.

    Args:
        standings: by label; all on the same items.
        scale: as for `Goal.merit`.
        keep: so many go on at most.
        ahead: the standard error of the proof as a part of that on these items: √(items here / items that prove).
    """
    labels = list(standings)
    lost = Axis.of([standings[label].lost for label in labels])
    forgot = Axis.of([standings[label].forgot for label in labels])
    fallen = _surely_beyond(labels, lost if goal.limit == "retention" else forgot, goal)
    fallen |= {label: why for label, why in _dominated(labels, lost, forgot).items() if label not in fallen}
    if len(fallen) == len(labels):  # nobody is within the limit: go on with those that come nearest
        fallen = {}
    smooth = np.stack([_smoothed(standings, axis.values) for axis in (lost, forgot)])
    errors = np.stack([lost.errors(), forgot.errors()])
    if goal.limit != "knee":
        errors[1 if goal.limit == "retention" else 0] = 0
    margins = [margin * ahead for margin in MARGINS]
    if keep > FINALISTS:
        margins.append(HOPE)
    orders = []
    for margin in margins if goal.limit != "knee" else MARGINS[-1:]:
        drawn = smooth + margin * errors
        merits = {label: goal.merit(float(drawn[0, at]), float(drawn[1, at]), scale) for at, label in enumerate(labels)}
        orders.append(sorted((label for label in labels if label not in fallen), key=lambda label: -merits[label]))
    left = list(dict.fromkeys(label for place in zip(*orders, strict=True) for label in place))
    for label in left[keep:]:
        fallen[label] = "others were ahead"
    return left[:keep], fallen


def rounds(candidates: int, budget: float, finalists: int = FINALISTS) -> list[tuple[int, float]]:
    """How many candidates each round has, and the share of the items that they have seen by its end.

    Every round costs the same. Shares rise to 1 at most.

    Args:
        budget: of all rounds together, in evaluations of one model on all items of the half that is for choosing.
    """
    counts = [candidates]
    while counts[-1] > finalists:
        counts.append(max(finalists, math.ceil(counts[-1] / 2)))
    plan, seen = [], 0.0
    for count in counts:
        seen = min(1.0, seen + budget / len(counts) / count)
        plan.append((count, seen))
    return plan


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise OptionError(f"`{name}` must be a share, such as 0.01, not {value}.")
    return value


def _surely_beyond(labels: Sequence[str], limited: Axis, goal: Goal) -> dict[str, str]:
    if goal.limit == "knee":
        return {}
    excess = limited.values - goal.most
    sure = _p_above_zero(excess, limited.errors(), limited.freedom) <= LEVEL / len(labels)
    return {label: "surely beyond the limit" for label, beyond in zip(labels, sure, strict=True) if beyond}


def _dominated(labels: Sequence[str], lost: Axis, forgot: Axis) -> dict[str, str]:
    """Those that another surely beats on both axes."""
    found, level = dict[str, str](), LEVEL / max(1, len(labels) * (len(labels) - 1))
    for at, better in enumerate(labels):
        worse = np.ones(len(labels), dtype=bool)
        for axis in (lost, forgot):
            gap = axis.values - axis.values[at]
            worse &= _p_above_zero(gap, axis.errors(at), axis.freedom) <= level
        for beaten in np.flatnonzero(worse).tolist():
            found.setdefault(labels[beaten], f"{better} keeps more and forgets less")
    return found


def _p_above_zero(values: Floats, errors: Floats, freedom: int) -> Floats:
    """One-sided p-values, [n]: small where a value is surely above 0."""
    from scipy.stats import t

    with np.errstate(all="ignore"):
        statistic = np.where(errors > 0, values / errors, np.sign(values) * np.inf)
    p: Floats = t.sf(np.nan_to_num(statistic, nan=-np.inf), freedom)
    return p


def _smoothed(standings: Mapping[str, Standing], values: Floats) -> Floats:
    """Scores in which neighbours along a line have a say: a line is fitted through each and its nearest, by tricube weights."""
    smooth = values.copy()
    lines: dict[Hashable, list[int]] = {}
    for at, standing in enumerate(standings.values()):
        if standing.line is not None and np.isfinite(values[at]):
            lines.setdefault(standing.line, []).append(at)
    places = np.array([standing.place for standing in standings.values()])
    for members in lines.values():
        if len(members) < 4:
            continue
        x, y = places[members], values[members]
        for at in members:
            distance = np.abs(x - places[at])
            reach = 1.5 * np.sort(distance)[2] or 1.0
            weight = np.sqrt(np.clip(1 - (distance / reach) ** 3, 0, None) ** 3)
            design = np.stack([np.ones_like(x), x - places[at]], axis=1)
            smooth[at] = np.linalg.lstsq(design * weight[:, None], y * weight, rcond=None)[0][0]
    return smooth
