"""Ratios for HMA, part by part, under a fixed mean (`surgery hma --optimize`; Lin et al., arXiv 2309.06256, adaptive averaging).

    max  ½ · (retention + 1 − forgetting)     over α_1 … α_P in [0, 1] with (α_1 + … + α_P) / P = the mean

The authors fix the mean, which decides how much of each model is left, and train the ratios on a loss. Here they come from a
pattern search on the scores themselves: from equal ratios on, 0.1 goes from one part to another, in each of the P · (P − 1)
directions, and the best of these is the next place; where none is better, the step is 0.05. At most 25 settings are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import permutations
from typing import TYPE_CHECKING

from surgery.comparison.grid import label
from surgery.comparison.sweep import Bout
from surgery.methods import Hma
from surgery.methods.scope import number, share
from surgery.text import fixed

if TYPE_CHECKING:
    from surgery.comparison.compare import Outcome
    from surgery.comparison.sweep import Edits
    from surgery.evaluation.bench import Observe
    from surgery.evaluation.scores import Measure
    from surgery.evaluation.scoring import Scoring

PARTS = 3
MOST = 25
STEPS = (Decimal("0.1"), Decimal("0.05"))
Ratios = tuple[float, ...]
Place = tuple[Decimal, ...]


def optimize(
    edits: Edits,
    mean: float,
    tasks: Sequence[Measure],
    general: Sequence[Measure],
    scoring: Scoring,
    *,
    observe: Observe = lambda *_: None,
) -> tuple[Hma, str]:
    """The best ratios of a mean, and a sentence about them.

    Args:
        edits: with a job of hma.
        mean: of the ratios, in [0, 1].
        tasks, general: as `scoring` makes them.
        observe: told of the progress.

    Raises:
        OptionError: the mean is no share, or the model has too few layers.
        SurgeryError: a setting cannot be edited or scored.
    """
    share("mean", mean)
    edits.check([Hma((mean,) * PARTS)])
    with scoring.bench([*tasks, *general], observe) as bench:
        bout = Bout(edits, bench, tasks, general)
        best = Hma(pattern_search(mean, lambda ratios: merit(bout.outcome(Hma(ratios)))))
        found, equal = bout.outcome(best), bout.outcome(Hma((mean,) * PARTS))
    return best, (
        f"{label(best)} was the best of {len(bout.scored)} settings with the mean {number(mean)}: {_scores(found)}; with equal "
        f"ratios {_scores(equal)}."
    )


def _scores(outcome: Outcome) -> str:
    kept, lost = map(fixed, (outcome.retention, outcome.forgetting))
    return f"retention {kept}, forgetting {lost}"


def merit(outcome: Outcome) -> float:
    """The mean of retention and 1 − forgetting; −inf where one is not defined."""
    if outcome.retention is None or outcome.forgetting is None:
        return -math.inf
    return (outcome.retention + 1 - outcome.forgetting) / 2


def pattern_search(mean: float, value: Callable[[Ratios], float], *, parts: int = PARTS, most: int = MOST) -> Ratios:
    """The best ratios that were found.

    Args:
        mean: of the ratios, in [0, 1].
        value: of ratios, more is better; asked once for each.
        parts: how many ratios.
        most: how often `value` is asked.
    """
    start: Place = (Decimal(repr(mean)),) * parts
    known = {start: value(_floats(start))}
    best = start
    for step in STEPS:
        while True:
            around = [place for pair in permutations(range(parts), 2) if (place := _moved(best, *pair, step))]
            for place in around:
                if place not in known and len(known) < most:
                    known[place] = value(_floats(place))
            found = max((place for place in around if place in known), key=known.__getitem__, default=best)
            if known[found] <= known[best]:
                break
            best = found
    return _floats(best)


def _moved(place: Place, giver: int, taker: int, step: Decimal) -> Place | None:
    """A step from one part to another; None where a ratio would leave [0, 1]."""
    moved = list(place)
    moved[giver] -= step
    moved[taker] += step
    return tuple(moved) if moved[giver] >= 0 and moved[taker] <= 1 else None


def _floats(place: Place) -> Ratios:
    return tuple(map(float, place))
