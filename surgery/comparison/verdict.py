"""The result of a search for the best model, and what a better one would take, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.comparison.proof import LEVEL, Drop, items_needed, mean_drop, p_beyond
from surgery.comparison.race import Goal
from surgery.text import share


def success(goal: Goal, row: Mapping[str, Any], items: int, p: float | None, scale: tuple[float, float]) -> str:
    """Describe the winner.

    Args:
        row: its row of the comparison, on items that nothing was chosen on.
        items: how many these are.
        p: of the test of the limit, if there is one.
        scale: see `surgery.comparison.race.Goal.merit`.
    """
    kept, forgot = (_spread(row, name) for name in ("retention", "forgetting"))
    text = f"{row['label']} keeps {kept} of ft's task score and forgets {forgot}, on {items:,} items that nothing was chosen on"
    if p is not None:
        return f"{text}. That it {goal} is proved at 95% (p = {p:.2g})."
    parts = []
    if row["retention"] is not None and scale[0] > 0:
        parts.append(f"{share(1 - (1 - row['retention']) / scale[0], 0)} of what fine-tuning gained is kept")
    if row["forgetting"] is not None and scale[1] > 0:
        parts.append(f"{share(1 - row['forgetting'] / scale[1], 0)} of what it forgot is undone")
    return f"{text}: the best trade-off of all that was tried, since {' and '.join(parts) or 'nothing beats it'}."


def failure(goal: Goal, label: str, p: float, drops: Sequence[Drop]) -> str:
    """Describe the model nearest to a limit that none was proved to hold, and what a proof would take.

    Args:
        label: of the nearest.
        p: of its test.
        drops: of what is limited, on the items that prove.
    """
    value, error = mean_drop(drops)
    count = min(len(drop.own) for drop in drops)
    forgetting = goal.limit == "forgetting"
    said = f"forgets {share(value, 2)}" if forgetting else f"keeps {share(1 - value, 2)}"
    ways = []
    if value < goal.most:
        ways.append(f"about {2 * items_needed(error * math.sqrt(count), goal.most - value):,} items of each measure")
    if (bound := _provable(drops)) is not None:
        ways.append(f"a limit of at most {share(bound, 2)}" if forgetting else f"one of at least {share(1 - bound, 2)}")
    return (
        f"No model could be proved to be one that {goal}, so nothing was written. {label} came nearest: it {said} on the "
        f"{count:,} items that prove (p = {p:.2g}). It would take {' or '.join(ways) or 'other models'}."
    )


def power_note(goal: Goal, drops: Sequence[Drop], there: int) -> str | None:
    """A sentence where there are too few items for a limit, even for a model that forgets half as much as it allows.

    The spread of such a model's items is taken from ft's, as if it had moved in the same way, but less far.

    Args:
        drops: how much ft forgot.
        there: items of each measure that prove.
    """
    if goal.limit != "forgetting" or goal.bound <= 0:
        return None
    value, error = mean_drop(drops)
    if not value > goal.bound:
        return None
    half, count = goal.bound / 2, min(len(drop.own) for drop in drops)
    # A share changes by items that flip, whose number falls with the drop; a loss changes everywhere a little.
    power = 0.5 if any(drop.kind == "share" for drop in drops) else 1.0
    needed = items_needed(error * math.sqrt(count) * (half / value) ** power, half)
    if needed <= there:
        return None
    return (
        f"To prove that a model {goal} takes about {2 * needed:,} items of each general measure, even where it forgets only half "
        f"of that; there are {2 * there:,}."
    )


def _spread(row: Mapping[str, Any], name: str) -> str:
    """A share with its interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = f" ({share(low, 2)} to {share(high, 2)})" if low is not None and high is not None else ""
    return f"{share(row[name], 2)}{ends}"


def _provable(drops: Sequence[Drop]) -> float | None:
    """The tightest limit that these items would prove, rounded up to two digits."""
    value, error = mean_drop(drops)
    low, high = value, value + 8 * error + 1e-6
    if not math.isfinite(high) or p_beyond(drops, high) > LEVEL:
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if p_beyond(drops, middle) <= LEVEL else (middle, high)
    digits = 1 - math.floor(math.log10(abs(high)))
    return float(np.ceil(high * 10**digits) / 10**digits)
