"""rouge-l: 2 P R / (P + R), where P and R are the shares of the words in the longest common subsequence (Lin, "ROUGE", 2004).

A word is a run of letters and digits with the marks on them, in lower case and not stemmed, of text that is composed by Unicode's
NFKC. Of English text these are the words of Google's rouge_score, which knows a–z and 0–9 only. Where a script has no blanks
between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each letter with its marks is a word.
"""

from __future__ import annotations

import unicodedata

from surgery.evaluation.measures.matching.common import similarity
from surgery.evaluation.measures.matching.metric import Metric

# First and last letter of the blocks of scripts without blanks between words.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # 々〆〇
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),  # more kana
    (0x3400, 0x4DBF),  # Chinese characters, in four blocks
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def rouge_l(generated: str, reference: str) -> float:
    """The F-measure of the words in common, in order."""
    return similarity(words(generated), words(reference))


def words(text: str) -> list[str]:
    """The words that rouge-l counts."""
    found: list[str] = []
    inside = alone = False  # in a word; in one of a single letter
    for letter in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind == "M" and inside:
            found[-1] += letter
        elif kind in "LN":
            apart = _is_unspaced(letter)
            if inside and not apart and not alone:
                found[-1] += letter
            else:
                found.append(letter)
            inside, alone = True, apart
        else:
            inside = False
    return found


def _is_unspaced(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in UNSPACED)


ROUGE_L = Metric("rouge-l", rouge_l, lambda reference: bool(words(reference)), "word", edition=2)
