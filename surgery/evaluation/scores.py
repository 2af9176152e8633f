"""Scores of a model on a measure, item by item, and what follows from them: the mean, its interval, and a paired test.

    share         each item is right or wrong, or between: 0 to 1, higher is better (accuracy, exact match, ROUGE-L)
    loss          mean negative log-likelihood per token, in nats
    perplexity    exp of that
    divergence    mean KL from the base model's predictions per token, in nats; 0 for the base model itself

Scores of different kinds are put on one scale by `against`: a share counts as it is, a loss as how likely the model finds a token
compared with a reference model, exp(loss_reference − loss), which for perplexities is their ratio. A divergence counts likewise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel

Kind = Literal["share", "loss", "perplexity", "divergence"]
Floats = NDArray[np.float64]
Item = TypeVar("Item")

CONFIDENCE = 0.95
RESAMPLES = 2000
FLIPS = 10_000
SEED = 0
BLOCK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a model's items.

    Attributes:
        kind: what the values are.
        values: float64 [items]: shares, or losses per token (for a perplexity too).
        weights: float64 [items], tokens for a loss; 1 each otherwise.
        items: what people want to see of each: its prompt, what was generated; may be empty dicts.
        extra: further numbers, such as the standard error that a harness reports.
    """

    kind: Kind
    values: Floats
    weights: Floats
    items: Sequence[dict[str, Any]] = ()
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The weighted mean of the values."""
        return float(self.values @ self.weights / self.weights.sum())

    @property
    def value(self) -> float:
        """The score: the mean, or its exponential for a perplexity."""
        return _shown(self.kind, self.mean)

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "share"

    def at(self, chosen: Sequence[int]) -> Scores:
        """The scores of some of the items, in that order."""
        places = np.asarray(chosen, np.int64)
        items = [self.items[place] for place in chosen] if len(self.items) else ()
        return Scores(self.kind, self.values[places], self.weights[places], items)

    def resampled(self) -> Floats:
        """The means of bootstrap samples of the items, [RESAMPLES], paired with those of any other scores of as many items."""
        return np.concatenate(
            [
                (self.weights[drawn] * self.values[drawn]).sum(1) / self.weights[drawn].sum(1)
                for drawn in _draws(len(self.values))
            ]
        )

    def interval(self) -> tuple[float, float]:
        """A 95% bootstrap interval of the score, over items, by percentiles; the same numbers every time."""
        low, high = limits(self.resampled())
        return _shown(self.kind, low), _shown(self.kind, high)

    def transitions(self, before: Scores) -> Transitions | None:
        """How many items turned from right to wrong, and from wrong to right, since another model.

        Returns:
            None where an item of either is neither right nor wrong, or they are not of the same items.
        """
        both = np.concatenate([self.values, before.values])
        if self.kind != "share" or len(self.values) != len(before.values) or not np.isin(both, (0.0, 1.0)).all():
            return None
        right, was = self.values == 1, before.values == 1
        return Transitions(_share(~right[was]), _share(right[~was]), float(1 - right.mean()), float(right.mean()))

    def paired_p(self, other: Scores) -> float:
        """Two-sided p of a paired permutation test against another model's scores on the same items.

        Under the null hypothesis each item's two values may be swapped: the signs of their weighted differences are drawn at
        random, 10,000 times with the same seed.

        Raises:
            ValueError: they are not of the same items.
        """
        if len(self.values) != len(other.values) or not np.array_equal(self.weights, other.weights):
            raise ValueError("the two models were not measured on the same items")
        differences = (self.values - other.values) * self.weights
        differences = differences[differences != 0]
        if not len(differences):
            return 1.0
        # What differs by rounding alone is as extreme.
        least = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
        random, extreme = np.random.default_rng(SEED), 0
        step = max(1, BLOCK // len(differences))
        for start in range(0, FLIPS, step):
            signs = random.integers(0, 2, (min(step, FLIPS - start), len(differences)), dtype=np.int8)
            extreme += int((np.abs((2.0 * signs - 1.0) @ differences) >= least).sum())
        return (extreme + 1) / (FLIPS + 1)


@dataclass(frozen=True)
class Transitions:
    """Changes that a mean hides: items that were right and are wrong now (1→0), and the other way round (0→1; arXiv 2510.17776).

    Attributes:
        lost: of the items that the base model got right, the share that this one gets wrong; None where there is none.
        gained: of those that it got wrong, the share that this one gets right, likewise.
        lost_by_chance, gained_by_chance: what a model of this one's accuracy has whose right answers fall on items at random:
            1 − its accuracy, and its accuracy.
    """

    lost: float | None
    gained: float | None
    lost_by_chance: float
    gained_by_chance: float


def _share(chosen: NDArray[np.bool_]) -> float | None:
    return float(chosen.mean()) if len(chosen) else None


def against(kind: Kind, mean: Any, reference: Any) -> Any:
    """A mean, or several, on the scale where averages are taken: a share as it is, a loss as exp(reference's − its own)."""
    return mean if kind == "share" else np.exp(reference - mean)


def limits(resampled: Floats) -> tuple[float, float]:
    """The 95% interval of resampled statistics, by percentiles."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return float(low), float(high)


class Measure(Protocol):
    """One thing that is measured on models.

    Attributes:
        name: for people, and its key among a run's measures.
        kind: of its scores.
        settings: everything that its scores depend on beside the model: what it is, a digest of its data, lengths.
    """

    name: str
    kind: Kind
    settings: dict[str, Any]

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model.

        Args:
            only: the positions of the items to measure it on; all of them by default.

        Raises:
            SurgeryError: it cannot be measured on this model.
        """


@runtime_checkable
class Counted(Measure, Protocol):
    """A measure that knows how many items it has before any model is there."""

    @property
    def count(self) -> int:
        """How many items it has."""


@runtime_checkable
class BasedMeasure(Measure, Protocol):
    """A measure that compares every model with a base model, which has to be asked first.

    Its settings name the base, whose own scores hold what else the measure has to know about it.
    """

    def bind(self, base: str) -> None:
        """Name the base, by a digest of all that it is."""

    def ask(self, base: LanguageModel, known: Scores | None, advance: Advance) -> Scores:
        """Remember what the base model says.

        Args:
            known: its own scores, if they were kept: then only what they do not hold is computed.

        Returns:
            The base's own scores.
        """

    @property
    def asked(self) -> bool:
        """Whether the base was asked."""


def picked(items: Sequence[Item], only: Sequence[int] | None) -> Sequence[Item]:
    """The items at some positions; all of them where none are named."""
    return items if only is None else [items[place] for place in only]


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of a model on several sets of items of one measure, as one."""
    return Scores(
        parts[0].kind,
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights for part in parts]),
        [item for part in parts for item in part.items],
    )


def digest(items: Any) -> str:
    """The SHA-256 of JSON values in canonical form, for a measure's settings."""
    return hashlib.sha256(json.dumps(items, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _shown(kind: Kind, mean: float) -> float:
    if kind != "perplexity":
        return mean
    try:
        return math.exp(mean)
    except OverflowError:  # a broken model's loss may be in the thousands
        return math.inf


def _draws(count: int) -> Iterator[NDArray[np.int64]]:
    """Indices of items drawn with replacement, [resamples, items] in blocks."""
    random, step = np.random.default_rng(SEED), max(1, BLOCK // count)
    for start in range(0, RESAMPLES, step):
        yield random.integers(0, count, (min(step, RESAMPLES - start), count))
