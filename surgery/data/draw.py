"""Fewer of a user's rows: those that are not too long, and a number of them drawn at random, the same each time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.data.rows import Data
from surgery.errors import OptionError


def drawn(count: int, wanted: int | None, seed: int = 0) -> list[int]:
    """Some of the numbers from 0 to count − 1, in order; all of them where no more are wanted than there are."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))


def letters(value: Any) -> int:
    """The characters of all texts in a record, row or message."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(letters, value.values()))
    return sum(map(letters, value)) if isinstance(value, Sequence) else 0


def fewer(data: Data, *, max_chars: int | None = None, sample: int | None = None, seed: int = 0) -> Data:
    """Data with fewer rows.

    Args:
        max_chars: rows with more characters, prompt and answer together, are left out.
        sample: so many of the others, drawn at random.

    Raises:
        OptionError: none is left.
    """
    short = [number for number, row in enumerate(data.rows) if max_chars is None or letters(row) <= max_chars]
    if not short:
        raise OptionError(f"{data.name}: every row has more than {max_chars:,} characters. Raise `max_chars`.")
    kept = [short[place] for place in drawn(len(short), sample, seed)]
    others = {new: data.others[old] for new, old in enumerate(kept) if old in data.others}
    rows = [data.rows[number] for number in kept]
    return replace(data, rows=rows, others=others, long=len(data.rows) - len(short), drawn=len(kept) < len(short))
