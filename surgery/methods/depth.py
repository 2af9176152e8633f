"""How deep in its model a tensor lies, for methods whose numbers depend on the depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.layout import Place


def layer_counts(places: Iterable[Place]) -> dict[str, int]:
    """The number of layers of each stack: one more than the highest index in it."""
    counts: dict[str, int] = {}
    for where in places:
        if where.layer is not None:
            counts[where.stack] = max(counts.get(where.stack, 0), where.layer + 1)
    return counts


def depth(where: Place, counts: dict[str, int]) -> float:
    """l / (L − 1) for layer l of L, from 0 to 1; 0 for embeddings, 1 for final norm and head, and for a stack's only layer.

    Args:
        where: the tensor's place.
        counts: of `layer_counts`, over the whole model.
    """
    if where.layer is None:
        return 0.0 if where.side == "input" else 1.0
    return where.layer / (counts[where.stack] - 1) if counts[where.stack] > 1 else 1.0


def interpolated(numbers: Sequence[float], at: float) -> float:
    """The numbers' piecewise linear function on [0, 1], on which they are evenly spaced.

    Args:
        numbers: two or more.
        at: from 0 to 1.
    """
    place = at * (len(numbers) - 1)
    left = min(int(place), len(numbers) - 2)
    part = place - left
    return (1 - part) * numbers[left] + part * numbers[left + 1]
