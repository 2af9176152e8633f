"""SQuAD's f1 and em (Rajpurkar et al., arXiv 1606.05250, as its evaluation script computes them).

    f1    2 P R / (P + R), where P and R are the shares of the words in common, each as often as both texts have it
    em    the words are the same, in order

Words are what blanks part, in lower case, without ASCII punctuation and without the articles a, an and the. Of two texts without
a word the match is 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from surgery.evaluation.measures.matching.metric import Metric

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def f1(generated: str, reference: str) -> float:
    """The F-measure of the words in common."""
    first, second = squad_words(generated), squad_words(reference)
    if not first or not second:
        return float(first == second)
    common = (Counter(first) & Counter(second)).total()
    return 2 * common / (len(first) + len(second))


def exact_match(generated: str, reference: str) -> float:
    """1 where the words are the same."""
    return float(squad_words(generated) == squad_words(reference))


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


F1 = Metric("f1", f1, bool, "text")
EM = Metric("em", exact_match, bool, "text")
