"""Choose the rows of a round: hold some out for evaluation, and replay rows of earlier tasks."""

from __future__ import annotations

import random

from surgery.data.rows import Row
from surgery.errors import OptionError


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows at random into those to train on and those to evaluate on; at least one of the latter if share is above 0.

    Raises:
        OptionError: none would be left to train on.
    """
    if not share:
        return rows, []
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise OptionError(f"`eval_split` {share} leaves none of {len(rows)} rows to train on. Give more data.")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in sorted(chosen)]


def replayed(rows: list[Row], old: list[Row], ratio: float, seed: int) -> list[Row]:
    """Append old rows, drawn at random, so that they make up the share `ratio` of the result.

    No old row comes twice before each has come once.
    """
    count, draw = round(ratio / (1 - ratio) * len(rows)), random.Random(seed)
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += draw.sample(old, min(len(old), count - len(drawn)))
    return rows + drawn
