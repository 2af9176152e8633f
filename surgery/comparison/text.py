"""Format scores for the tables, plots and page of a comparison, and escape text for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from surgery.text import finite, number, readable, share

# (p below this, its mark)
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def score(kind: str, value: Any) -> str:
    """Format a score: a share in percent, others as numbers."""
    return share(value) if kind == "share" else number(value)


def interval(kind: str, low: Any, high: Any) -> str:
    """Format an interval, such as "1.2 to 3.4%"; empty if an end is missing."""
    if finite(low) is None or finite(high) is None:
        return ""
    return f"{score(kind, low).removesuffix('%')} to {score(kind, high)}"


def stars(p: Any) -> str:
    """Return the stars of a p-value; none from 0.05 on."""
    found = finite(p)
    return next((mark for limit, mark in STARS if found is not None and found < limit), "")


def html(text: Any) -> str:
    """Escape text for HTML and for quoted attributes."""
    return escape(readable(str(text)))


def listed(parts: Sequence[str], most: int = 5) -> str:
    """Join texts as "a, b and c"; if there are more than `most`, as "a, b and 7 more"."""
    if len(parts) > most:
        parts = [*parts[: most - 1], f"{len(parts) - most + 1} more"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)
