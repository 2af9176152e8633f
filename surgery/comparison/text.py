"""Scores as the tables, the plots and the page of a comparison show them, and text for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from surgery.text import finite, number, readable, share

# (p below this, its mark)
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def score(kind: str, value: Any) -> str:
    """A score on its measure's own scale."""
    return share(value) if kind == "share" else number(value)


def interval(kind: str, low: Any, high: Any) -> str:
    """The ends of an interval, or nothing where one of them is missing."""
    if finite(low) is None or finite(high) is None:
        return ""
    return f"{score(kind, low).removesuffix('%')} to {score(kind, high)}"


def stars(p: Any) -> str:
    """The mark of a p-value, empty from 0.05 on."""
    found = finite(p)
    return next((mark for limit, mark in STARS if found is not None and found < limit), "")


def html(text: Any) -> str:
    """Text from a file, made harmless in HTML text and in quoted attributes."""
    return escape(readable(str(text)))


def listed(parts: Sequence[str], most: int = 5) -> str:
    """ "a, b and c"; past `most`, "a, b and 7 more"."""
    if len(parts) > most:
        parts = [*parts[: most - 1], f"{len(parts) - most + 1} more"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)
