"""Prove, on items that nothing was chosen on, that a model stays within a limit.

A claim such as "forgets at most 1%" is about all items of a kind, of which a few were measured. `p_beyond` tests it:
the p-value of "the true value is at the limit or beyond". For losses and divergences, which are skewed so that a
t-test claims too much, it comes from a studentised bootstrap over the items (Hall 1988, "Theoretical Comparison of
Bootstrap Confidence Intervals"); for accuracies from a t-test. The items are completed by one like the worst that was
seen, which keeps the error rate at its level for heavy tails and for accuracies where no item flipped:
tests/comparison/test_proof.py measures that rate.

`certify` tests several models in a sequence that was fixed before anybody looked at these items, and stops at the
first that fails (fixed-sequence testing, as in "Learn then Test", Angelopoulos et al., arXiv 2110.01052). The chance
that any model that it passes is beyond the limit is at most the level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from surgery.evaluation.scores import Floats, Kind, Scores

LEVEL = 0.05
RESAMPLES = 2000
SEED = 0
BLOCK = 1 << 22  # numbers drawn at once

Candidate = TypeVar("Candidate")


@dataclass(frozen=True, eq=False)
class Drop:
    """How much worse a model is than a reference on one measure, item by item.

    The drop is 0 for the reference itself and rises as the model gets worse. For a loss or a divergence it is the share of the
    likelihood that is lost, 1 − exp(reference − own); for a share it is reference − own, or 1 − own / reference where `relative`.

    Attributes:
        kind: of both scores.
        own, reference: float64 [n], the values of the same n items.
        weights: float64 [n], such as tokens.
        relative: a share counts as a part of the reference's, as retention does.
    """

    kind: Kind
    own: Floats
    reference: Floats
    weights: Floats
    relative: bool = False

    @staticmethod
    def between(own: Scores, reference: Scores, *, relative: bool = False) -> Drop:
        """The drop between two models' scores.

        Raises:
            ValueError: they are not of the same items.
        """
        if not np.array_equal(own.weights, reference.weights):
            raise ValueError("the two models were not measured on the same items")
        return Drop(own.kind, own.values, reference.values, own.weights, relative)

    def with_worst(self) -> Drop:
        """The same with one more item: the worst of a share, or else the one where the model fell behind most."""
        if self.kind == "share":
            own, reference, weight = 0.0, 1.0, 1.0
        else:
            worst = int(np.argmax(self.own - self.reference))
            own, reference, weight = self.own[worst], self.reference[worst], self.weights[worst]
        return Drop(
            self.kind,
            np.append(self.own, own),
            np.append(self.reference, reference),
            np.append(self.weights, weight),
            self.relative,
        )

    def estimate(self, drawn: NDArray[np.int64] | None = None) -> tuple[Floats, Floats]:
        """The drop and its squared standard error, by linearisation (the delta method).

        Args:
            drawn: indices of items, int64 [samples, n]; all items once where it is missing.

        Returns:
            Two float64 arrays [samples].
        """
        drop, influence = self.influence(drawn)
        count = influence.shape[1]
        return drop, (influence**2).sum(1) / max(count - 1, 1) / count

    def influence(self, drawn: NDArray[np.int64] | None = None) -> tuple[Floats, Floats]:
        """The drop, float64 [samples], and how far each item moves it, float64 [samples, n], whose mean over the items is 0."""
        own, reference, weights = (
            array[None] if drawn is None else array[drawn] for array in (self.own, self.reference, self.weights)
        )
        count, whole = own.shape[1], weights.sum(1)
        mine, theirs = (weights * own).sum(1) / whole, (weights * reference).sum(1) / whole
        with np.errstate(all="ignore"):
            if self.kind != "share":
                drop = -np.expm1(theirs - mine)
                by_mine, by_theirs = 1 - drop, drop - 1
            elif self.relative:
                drop = 1 - mine / theirs
                by_mine, by_theirs = -1 / theirs, mine / theirs**2
            else:
                drop, by_mine, by_theirs = theirs - mine, -np.ones_like(mine), np.ones_like(mine)
            influence = by_mine[:, None] * (own - mine[:, None]) + by_theirs[:, None] * (reference - theirs[:, None])
            influence *= weights / (whole / count)[:, None]
        return drop, influence


def mean_drop(drops: Sequence[Drop]) -> tuple[float, float]:
    """The mean over several measures' drops, and its standard error; the measures' items are independent."""
    found = [drop.estimate() for drop in drops]
    value = float(np.mean([drop[0] for drop, _ in found]))
    return value, math.sqrt(float(np.sum([squared[0] for _, squared in found]))) / len(drops)


def p_beyond(drops: Sequence[Drop], limit: float) -> float:
    """The p-value of the hypothesis that the true mean drop is `limit` or more: small means that the limit holds.

    The same numbers every time, since the bootstrap's draws are seeded.

    Args:
        drops: one for each measure, with one item or more.
        limit: such as 0.01 for one point of accuracy or one percent of likelihood.

    Returns:
        In (0, 1]; 1 where a number is not finite.
    """
    whole = [drop.with_worst() for drop in drops]
    value, error = mean_drop(whole)
    if not math.isfinite(value + error):
        return 1.0
    if error == 0:
        return 1 / (RESAMPLES + 1) if value < limit else 1.0
    observed = (value - limit) / error
    if all(drop.kind == "share" for drop in whole):
        # Bounded, so that a t-test holds; where hardly an item flipped, resamples without any would look too sure.
        from scipy.stats import t

        return float(t.cdf(observed, min(len(drop.own) for drop in whole) - 1))
    below = 0
    for blocks in _draws([len(drop.own) for drop in whole]):
        found = [drop.estimate(drawn) for drop, drawn in zip(whole, blocks, strict=True)]
        centers = np.mean([drop for drop, _ in found], axis=0) - value
        errors = np.sqrt(np.sum([squared for _, squared in found], axis=0)) / len(whole)
        with np.errstate(all="ignore"):
            pivots = np.where(errors > 0, centers / errors, np.sign(centers) * np.inf)
        # A resample that is no number counts against the claim.
        below += int((~(pivots > observed)).sum())
    return (below + 1) / (RESAMPLES + 1)


def certify(
    candidates: Sequence[Candidate], p_value: Callable[[Candidate], float], *, level: float = LEVEL
) -> tuple[list[Candidate], list[float]]:
    """Pass candidates one after another until the first whose p-value is above the level.

    Args:
        candidates: in an order that does not depend on the items that `p_value` looks at, the safest first.
        p_value: of the hypothesis that the candidate is beyond the limit; asked until the first failure only.

    Returns:
        The candidates that passed, and the p-values of all that were tested. With a probability of at least 1 − level, every
        candidate that passed is within the limit.
    """
    passed, values = list[Candidate](), list[float]()
    for candidate in candidates:
        values.append(p_value(candidate))
        if values[-1] > level:
            break
        passed.append(candidate)
    return passed, values


def items_needed(deviation: float, margin: float) -> int:
    """How many items prove a limit in four cases of five: those of a one-sided test at 95% with a power of 80%.

    Args:
        deviation: standard deviation of an item's drop.
        margin: how far the model's true drop is from the limit.
    """
    from scipy.stats import norm

    if margin <= 0:
        raise ValueError("a model at its limit cannot be proved to be within it")
    return max(2, math.ceil(float((norm.isf(LEVEL) + norm.isf(0.2)) * deviation / margin) ** 2))


def _draws(counts: Sequence[int]) -> Iterator[list[NDArray[np.int64]]]:
    """Indices of items drawn with replacement, for each measure [samples, items], in blocks of samples."""
    random, step = np.random.default_rng(SEED), max(1, BLOCK // sum(counts))
    for start in range(0, RESAMPLES, step):
        samples = min(step, RESAMPLES - start)
        yield [random.integers(0, count, (samples, count)) for count in counts]
