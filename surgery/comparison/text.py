"""Numbers and names as the page shows them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from surgery.display import readable

MISSING = "–"
# (p below this, its mark)
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def finite(value: Any) -> float | None:
    """A number of a document, or None where it holds none that is finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def share(value: Any) -> str:
    """0.987 as "98.7%"."""
    found = finite(value)
    return MISSING if found is None else _minus(f"{100 * found:.1f}%")


def number(value: Any) -> str:
    """Three decimals for small numbers, three significant digits and more for others."""
    found = finite(value)
    if found is None:
        return MISSING
    if abs(found) >= 1e5:
        return _minus(f"{found:.2e}")
    return _minus(f"{found:,.{3 if abs(found) < 10 else 2 if abs(found) < 100 else 1 if abs(found) < 1000 else 0}f}")


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


def words(command: Sequence[str]) -> str:
    """A command as a shell reads it, its line breaks kept."""
    return "\n".join(map(readable, shlex.join(command).split("\n")))


def html(text: Any) -> str:
    """Text from a file, made harmless in HTML text and in quoted attributes."""
    return escape(readable(str(text)))


def listed(parts: Sequence[str], most: int = 5) -> str:
    """ "a, b and c"; past `most`, "a, b and 7 more"."""
    if len(parts) > most:
        parts = [*parts[: most - 1], f"{len(parts) - most + 1} more"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _minus(text: str) -> str:
    return "0" + text[2:] if text.startswith("-0") and not text.strip("-0.%") else text.replace("-", "−")
