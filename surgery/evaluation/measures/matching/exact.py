"""exact: the texts are the same but for blanks, case and punctuation at the end."""

from __future__ import annotations

from surgery.evaluation.measures.matching.metric import Metric


def exact(generated: str, reference: str) -> float:
    """1 where the texts are the same."""
    return float(_normal(generated) == _normal(reference))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")


EXACT = Metric("exact", exact, bool, "text")
