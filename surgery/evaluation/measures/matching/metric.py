"""A way to compare two texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric in the registry.

    Attributes:
        name: as a user types it.
        match: takes what was generated and a reference, and returns a number from 0 to 1.
        comparable: whether there is anything to compare with in a reference.
        needs: what a reference has to hold for that, in words.
        edition: counts up when `match` gives other numbers, so that kept scores are not mixed with new ones.
    """

    name: str
    match: Callable[[str, str], float]
    comparable: Callable[[str], bool]
    needs: str
    edition: int = 1
