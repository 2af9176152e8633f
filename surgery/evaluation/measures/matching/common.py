"""The longest common subsequence of two texts, on which rouge-l and edit-similarity are built."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """2 c / (m + n), where c is the length of the longest common subsequence of sequences of m and n; 0 where c is."""
    common = longest_common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def longest_common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence, a row of the table at once in the bits of an integer.

    Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem" (2001): bit i of
    `row` is 0 where the table grows from first[:i] to first[:i + 1].
    """
    places: dict[Hashable, int] = {}
    for at, part in enumerate(first):
        places[part] = places.get(part, 0) | 1 << at
    full = (1 << len(first)) - 1
    row = full
    for part in second:
        here = row & places.get(part, 0)
        row = ((row + here) | (row - here)) & full
    return len(first) - row.bit_count()
