"""numeric: the final numbers of the texts are the same, as GSM8K is scored: the one after "####", or else the last.

Fractions and numbers in words are not understood.
"""

from __future__ import annotations

import re
from decimal import Decimal

from surgery.evaluation.measures.matching.metric import Metric

MARK = "####"
# A minus counts where it cannot be a subtraction or a range; commas only between thousands.
NUMBER = re.compile(
    r"((?<![0-9A-Za-z)])[-−])?(?:\$(-?))?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def numeric(generated: str, reference: str) -> float:
    """1 where the final numbers are the same."""
    wanted = final_number(reference)
    return float(wanted is not None and final_number(generated) == wanted)


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to; None where it has none."""
    _, mark, after = text.partition(MARK)
    if mark and (first := NUMBER.search(after)):
        return _decimal(first)
    numbers = list(NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def _decimal(found: re.Match[str]) -> Decimal:
    number = Decimal(found[3].replace(",", ""))
    return -number if found[1] or found[2] else number


NUMERIC = Metric("numeric", numeric, lambda reference: final_number(reference) is not None, "number")
