"""Turn names and numbers into text for terminals, JSON and CSV, and make harmless what others wrote.

The name of a tensor, a path, a note or a library's error may hold anything: commands to the terminal (ESC, C1), characters that
change the direction of writing, line breaks, formulas for a spreadsheet. Everything printed goes through `readable`, called by
`surgery.display` and `surgery.__main__`; all JSON goes through `dumps`, and all CSV through `csv_lines`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"
LABELS = {"feed_forward": "feed-forward"}
# A spreadsheet takes a cell that begins so for a formula; the last four are the wide forms of the first.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_UNUSUAL = re.compile(r"[^ -~\n]")


def readable(text: str) -> str:
    """Escape every character that is not printable, line breaks among them, as in a Python string."""
    return text if text.isprintable() else "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def words(command: Sequence[str]) -> str:
    """Quote a command for a shell. Line breaks are kept, so that it can be pasted; other unprintable characters are escaped."""
    return "\n".join(map(readable, shlex.join(command).split("\n")))


def dumps(document: Any) -> bytes:
    r"""Return a document as JSON in UTF-8, for standard output and for files; unprintable characters are written as \uXXXX.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _UNUSUAL.sub(lambda found: _escaped(found[0]), text).encode()


def csv_lines(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return rows as CSV in UTF-8. None is an empty field; text is `readable`, and gets a leading ' if it could be a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def label(category: str) -> str:
    """Return the name of a category of tensors as people write it."""
    return LABELS.get(category, category)


def finite(value: Any) -> float | None:
    """Return the value as a float if it is a finite number, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def share(value: Any, digits: int = 1) -> str:
    """Format 0.987 as "98.7%"."""
    found = finite(value)
    return MISSING if found is None else _minus(f"{100 * found:.{digits}f}%")


def number(value: Any) -> str:
    """Format a number with three decimals if it is small, and fewer if it is large."""
    found = finite(value)
    if found is None:
        return MISSING
    if abs(found) >= 1e5:
        return _minus(f"{found:.2e}")
    return _minus(f"{found:,.{3 if abs(found) < 10 else 2 if abs(found) < 100 else 1 if abs(found) < 1000 else 0}f}")


def fixed(value: Any, digits: int = 4) -> str:
    """Format a number with a fixed count of decimals."""
    found = finite(value)
    return MISSING if found is None else f"{found:.{digits}f}"


def brief(value: Any) -> str:
    """Format a number of any size, zero or above, with three digits in at most seven characters."""
    found = finite(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    return f"{found:.3g}" if 1e-3 <= found < 1000 else f"{found:.1e}"


def count(value: int | None) -> str:
    """Format 12345678 as "12.3M"."""
    if value is None:
        return MISSING
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def size(value: int) -> str:
    """Format 1234567 bytes as "1.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def duration(seconds: Any) -> str:
    """Format 150 as "2.5 minutes"."""
    found = finite(seconds)
    if found is None:
        return MISSING
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if found >= 2 * length:
            return f"{found / length:.1f} {unit}"
    return f"{found:.1f} seconds"


def _escaped(mark: str) -> str:
    if mark.isprintable():
        return mark
    return f"\\u{ord(mark):04x}" if ord(mark) < 0x10000 else json.dumps(mark)[1:-1]


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    shown = readable(value)
    return f"'{shown}" if shown.lstrip().startswith(FORMULA) else shown


def _minus(text: str) -> str:
    return "0" + text[2:] if text.startswith("-0") and not text.strip("-0.%") else text.replace("-", "−")
