"""How well a generated answer matches the reference, from 0 to 1.

    exact      the texts are the same but for blanks, case and punctuation at the end
    numeric    their final numbers are the same, as GSM8K is scored: the one after "####", or else the last
    rouge-l    2 P R / (P + R), where P and R are the shares of the words that are in the longest common subsequence (Lin,
               "ROUGE", 2004); words are those of Google's rouge_score, runs of a–z and 0–9 in lower case, not stemmed

Fractions and numbers in words are not understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

MARK = "####"
# A minus counts where it cannot be a subtraction or a range; commas only between thousands.
NUMBER = re.compile(
    r"((?<![0-9A-Za-z)])[-−])?(?:\$(-?))?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
WORD = re.compile("[a-z0-9]+")


def exact(generated: str, reference: str) -> float:
    """1 where the texts are the same."""
    return float(_normal(generated) == _normal(reference))


def numeric(generated: str, reference: str) -> float:
    """1 where the final numbers are the same."""
    wanted = final_number(reference)
    return float(wanted is not None and final_number(generated) == wanted)


def rouge_l(generated: str, reference: str) -> float:
    """The F-measure of the words in common, in order."""
    first, second = words(generated), words(reference)
    common = _common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "numeric": numeric, "rouge-l": rouge_l}


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to; None where it has none."""
    _, mark, after = text.partition(MARK)
    if mark and (first := NUMBER.search(after)):
        return _decimal(first)
    numbers = list(NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def words(text: str) -> list[str]:
    """The words that rouge-l counts."""
    return WORD.findall(text.lower())


def _decimal(found: re.Match[str]) -> Decimal:
    number = Decimal(found[3].replace(",", ""))
    return -number if found[1] or found[2] else number


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")


def _common(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence, a row of the table at once in the bits of an integer.

    Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem" (2001): bit i of
    `row` is 0 where the table grows from first[:i] to first[:i + 1].
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        here = row & places.get(word, 0)
        row = ((row + here) | (row - here)) & full
    return len(first) - row.bit_count()
