"""Names and numbers as text: for a terminal, for JSON, for CSV. The one place that makes harmless what others wrote.

A tensor's name, a path, a note or an error of a library may hold anything: commands to the terminal (ESC, C1), marks that turn
the direction of writing, line breaks, formulas for a spreadsheet. All that is printed goes through `readable`, in
`surgery.display` and `surgery.__main__`; all JSON through `dumps`; all CSV through `csv_lines`.
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
    """Text in one line of printable characters; every other character is escaped as in a Python string."""
    return text if text.isprintable() else "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def words(command: Sequence[str]) -> str:
    """A command as a shell reads it. Its line breaks are kept, so that it can be pasted."""
    return "\n".join(map(readable, shlex.join(command).split("\n")))


def dumps(document: Any) -> bytes:
    r"""JSON in UTF-8, the same on standard output and in a file; characters that are not printable stand as \uXXXX.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _UNUSUAL.sub(lambda found: _escaped(found[0]), text).encode()


def csv_lines(rows: Iterable[Iterable[Any]]) -> bytes:
    """CSV in UTF-8. None is an empty field; text is readable, and has a ' before it where it could be a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def label(category: str) -> str:
    """A category of tensors as people write it."""
    return LABELS.get(category, category)


def finite(value: Any) -> float | None:
    """A number of a document, or None where it holds none that is finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def share(value: Any, digits: int = 1) -> str:
    """0.987 as "98.7%"."""
    found = finite(value)
    return MISSING if found is None else _minus(f"{100 * found:.{digits}f}%")


def number(value: Any) -> str:
    """Three decimals for small numbers, three significant digits and more for others."""
    found = finite(value)
    if found is None:
        return MISSING
    if abs(found) >= 1e5:
        return _minus(f"{found:.2e}")
    return _minus(f"{found:,.{3 if abs(found) < 10 else 2 if abs(found) < 100 else 1 if abs(found) < 1000 else 0}f}")


def fixed(value: Any, digits: int = 4) -> str:
    """A number with so many decimals."""
    found = finite(value)
    return MISSING if found is None else f"{found:.{digits}f}"


def brief(value: Any) -> str:
    """A number of any size from zero on, with three digits in at most seven characters."""
    found = finite(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    return f"{found:.3g}" if 1e-3 <= found < 1000 else f"{found:.1e}"


def count(value: int | None) -> str:
    """A number of entries in a few characters: 12.3M."""
    if value is None:
        return MISSING
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def size(value: int) -> str:
    """1234567 as "1.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


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
