"""Claims on a limit: their arithmetic against the literal formula, and how often they are wrong, by simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from surgery.comparison.proof import Drop, certify, items_needed, mean_drop, p_beyond

LIMIT = 0.02


def drop_of(kind: str, own: list[float], reference: list[float], weights: list[float], relative: bool = False) -> Drop:
    return Drop(kind, np.array(own), np.array(reference), np.array(weights), relative)  # type: ignore[arg-type]


def test_the_drop_of_a_loss_is_the_lost_share_of_the_likelihood() -> None:
    drop = drop_of("loss", [2.0, 1.0, 3.5], [1.9, 1.2, 3.0], [10, 30, 5])
    mine, theirs = (10 * 2.0 + 30 * 1.0 + 5 * 3.5) / 45, (10 * 1.9 + 30 * 1.2 + 5 * 3.0) / 45
    assert mean_drop([drop])[0] == pytest.approx(1 - math.exp(theirs - mine))


def test_the_drop_of_a_share_is_in_points_or_a_part_of_the_reference() -> None:
    own, reference = [1, 0, 0, 1, 0], [1, 1, 1, 1, 0]
    points, part = (drop_of("share", [*map(float, own)], [*map(float, reference)], [1] * 5, r) for r in (False, True))
    assert mean_drop([points])[0] == pytest.approx(float(Fraction(4, 5) - Fraction(2, 5)))
    assert mean_drop([part])[0] == pytest.approx(1 - 2 / 4)


@pytest.mark.parametrize(("kind", "relative"), [("loss", False), ("share", False), ("share", True)])
def test_the_standard_error_is_that_of_many_samples(kind: str, relative: bool) -> None:
    random = np.random.default_rng(3)
    values = []
    for _ in range(4000):
        own, reference = sample(random, kind)
        values.append(mean_drop([Drop(kind, own, reference, np.ones(200), relative)])[0])  # type: ignore[arg-type]
    own, reference = sample(random, kind, 200_000)
    error = mean_drop([Drop(kind, own, reference, np.ones(200_000), relative)])[1] * math.sqrt(1000)  # type: ignore[arg-type]
    assert error == pytest.approx(np.std(values), rel=0.05)


def sample(random: np.random.Generator, kind: str, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    if kind == "loss":
        reference = random.gamma(2.0, 1.0, count)
        return reference + random.normal(0.1, 0.3, count), reference
    reference = (random.random(count) < 0.7).astype(float)
    return np.where(random.random(count) < 0.1, 1 - reference, reference), reference


@pytest.mark.parametrize("tail", ["lognormal", "gamma", "flips"])
def test_a_false_claim_is_made_in_five_of_a_hundred_runs_at_most(tail: str) -> None:
    """Four candidates that are all just beyond the limit, on the same items: the first that fails ends the sequence."""
    random, runs, false = np.random.default_rng(7), 400, 0
    for _ in range(runs):
        candidates = [beyond(random, tail, 120) for _ in range(4)]
        passed, _ = certify(candidates, lambda drop: p_beyond([drop], LIMIT))
        false += bool(passed)
    # 5%, and three standard errors of a share of so many runs.
    assert false / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def beyond(random: np.random.Generator, tail: str, count: int) -> Drop:
    """Items of a model whose true drop is exactly the limit."""
    if tail == "flips":
        draw, rate = random.random(count), 0.03
        reference = np.where(draw < rate + LIMIT, 1.0, np.where(draw < 2 * rate + LIMIT, 0.0, 1.0))
        own = np.where(draw < rate + LIMIT, 0.0, np.where(draw < 2 * rate + LIMIT, 1.0, 1.0))
        return Drop("share", own, reference, np.ones(count))
    mean = -math.log1p(-LIMIT)
    own = random.lognormal(0, 1, count) / math.exp(0.5) if tail == "lognormal" else random.gamma(0.5, 2.0, count)
    return Drop("loss", mean * own, np.zeros(count), np.ones(count))


def test_a_model_that_is_well_within_the_limit_is_proved_to_be() -> None:
    random = np.random.default_rng(5)
    proved = [
        p_beyond([Drop("loss", 0.25 * LIMIT * random.gamma(2.0, 0.5, 200), np.zeros(200), np.ones(200))], LIMIT) <= 0.05
        for _ in range(40)
    ]
    assert np.mean(proved) > 0.95


def test_no_item_that_flipped_proves_little_of_few_items() -> None:
    same = np.ones(40)
    assert p_beyond([Drop("share", same, same, same)], 0.01) > 0.05
    many = np.ones(4000)
    assert p_beyond([Drop("share", many, many, many)], 0.01) <= 0.05


def test_what_is_no_number_proves_nothing() -> None:
    broken = Drop("loss", np.array([1.0, math.inf, 1.0]), np.zeros(3), np.ones(3))
    assert p_beyond([broken], 0.5) == 1


def test_the_sequence_ends_at_the_first_failure() -> None:
    asked: list[str] = []

    def p_value(name: str) -> float:
        asked.append(name)
        return {"a": 0.01, "b": 0.2, "c": 0.0}[name]

    assert certify(["a", "b", "c"], p_value) == (["a"], [0.01, 0.2])
    assert asked == ["a", "b"]


def test_the_number_of_items_gives_the_power_that_it_says() -> None:
    count = items_needed(0.3, 0.05)
    random = np.random.default_rng(1)
    means = random.normal(-0.05, 0.3, (4000, count)).mean(1)
    assert np.mean(means < -1.6449 * 0.3 / math.sqrt(count)) == pytest.approx(0.8, abs=0.02)
