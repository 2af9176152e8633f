"""Which rows a round trains on: some are held out, older ones are replayed."""

from __future__ import annotations

import random

from surgery.data.rows import Row
from surgery.errors import OptionError


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Deal rows at random into those to train on and those to evaluate on, at least one where share is above 0.

    Raises:
        OptionError: none would be left to train on.
    """
    if not share:
        return rows, []
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise OptionError(f"--eval-split {share} leaves none of {len(rows)} rows to train on. Give more data.")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in sorted(chosen)]


def replayed(rows: list[Row], old: list[Row], ratio: float, seed: int) -> list[Row]:
    """Rows with as many old ones behind them, drawn at random, that they are `ratio` of the whole.

    No old row comes twice before each has come once.
    """
    count, draw = round(ratio / (1 - ratio) * len(rows)), random.Random(seed)
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += draw.sample(old, min(len(old), count - len(drawn)))
    return rows + drawn
