"""Intervals and tests, against the enumeration of everything that could have been drawn."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from surgery.evaluation.scores import Kind, Scores, Transitions, against, digest


def scores(values: list[float], weights: list[float] | None = None, kind: Kind = "share") -> Scores:
    return Scores(kind, np.array(values, np.float64), np.array(weights or [1.0] * len(values), np.float64))


def test_a_score_is_the_weighted_mean_and_its_exponential_for_a_perplexity() -> None:
    assert scores([1.0, 3.0], [3.0, 1.0], "loss").value == 1.5
    assert scores([1.0, 3.0], [3.0, 1.0], "perplexity").value == math.exp(1.5)


def test_the_perplexity_of_a_broken_model_is_infinite_and_no_crash() -> None:
    found = scores([5000.0, 6000.0], kind="perplexity")
    assert found.value == math.inf
    assert found.interval() == (math.inf, math.inf)


def test_bootstrap_means_come_as_often_as_among_all_samples() -> None:
    found = scores([0.0, 1.0, 3.0], [1.0, 2.0, 5.0], "loss")
    every: dict[float, int] = {}
    for drawn in itertools.product(range(3), repeat=3):
        weight = sum(found.weights[index] for index in drawn)
        mean = round(float(sum(found.weights[index] * found.values[index] for index in drawn) / weight), 12)
        every[mean] = every.get(mean, 0) + 1
    means = found.resampled().round(12)
    assert set(means.tolist()) == set(every)
    for mean, ways in every.items():
        share = ways / 27
        assert abs(float((means == mean).mean()) - share) < 4 * math.sqrt(share * (1 - share) / len(means))


def test_an_interval_holds_the_truth_in_95_of_100_experiments() -> None:
    random = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        low, high = scores(random.normal(2.0, 1.0, 60).tolist(), kind="loss").interval()
        held += low <= 2.0 <= high
    assert 178 <= held <= 200


def test_an_interval_is_the_same_every_time_and_in_the_scores_own_unit() -> None:
    losses = scores([1.0, 2.0, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0], "loss")
    low, high = losses.interval()
    assert (low, high) == losses.interval()
    assert low < losses.value < high
    perplexity = Scores("perplexity", losses.values, losses.weights)
    assert perplexity.interval() == (math.exp(low), math.exp(high))


@pytest.mark.parametrize("count", [3000, 5000])
def test_a_bootstrap_in_blocks_draws_what_one_in_a_piece_would(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=count).tolist()
    whole = scores(values).resampled()
    monkeypatch.setattr("surgery.evaluation.scores.BLOCK", 7 * count)
    assert np.array_equal(scores(values).resampled(), whole)


@pytest.mark.parametrize(
    "differences",
    [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, -1, 0],
        [3, -1, 4, 1, -5, 9, 2, 6],
        [1, 2, -3],  # in tenths, their sum is no 0 but for rounding
        [1, -1],
    ],
)
def test_p_is_that_of_all_swaps(differences: list[int]) -> None:
    tenths: list[Any] = [Fraction(number, 10) for number in differences]
    sums = [
        abs(sum(sign * number for sign, number in zip(signs, tenths, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(tenths))
    ]
    exact = sum(found >= abs(sum(tenths)) for found in sums) / len(sums)
    other = scores([0.0] * len(differences), kind="loss")
    p = scores([number / 10 for number in differences], kind="loss").paired_p(other)
    assert abs(p - exact) < 0.02
    assert p == other.paired_p(scores([number / 10 for number in differences], kind="loss"))


def test_p_weighs_items_by_their_tokens() -> None:
    ours, other, weights = [3.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 10.0, 1.0]
    even = scores(ours, kind="loss").paired_p(scores(other, kind="loss"))
    heavy = scores(ours, weights, "loss").paired_p(scores(other, weights, "loss"))
    assert abs(even - 6 / 8) < 0.02  # 3 + 1 − 1, among 5, 3, 3 and 1
    assert abs(heavy - 4 / 8) < 0.02  # 3 + 10 − 1, among 14, 12, 8 and 6


def test_equal_models_do_not_differ_and_other_items_cannot_be_compared() -> None:
    assert scores([1.0, 0.0]).paired_p(scores([1.0, 0.0])) == 1.0
    for other in (scores([1.0]), scores([1.0, 0.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same items"):
            scores([1.0, 0.0]).paired_p(other)


def test_one_scale_for_all_kinds() -> None:
    assert against("share", 0.25, 0.5) == 0.25
    assert against("loss", 2.0, 2.0) == 1.0
    assert math.isclose(against("perplexity", math.log(30), math.log(15)), 0.5)


def test_a_digest_is_of_the_content_alone() -> None:
    assert digest([{"a": 1, "b": "ä"}]) == digest([{"b": "ä", "a": 1}])
    assert digest([{"a": 1}, {"b": 2}]) != digest([{"b": 2}, {"a": 1}])


def shares(*values: float) -> Scores:
    return Scores("share", np.array(values, np.float64), np.ones(len(values)))


def test_transitions_count_what_turned() -> None:
    before, after = shares(1, 1, 1, 0, 0), shares(1, 0, 0, 1, 0)
    found = after.transitions(before)
    assert found is not None
    assert found.lost == pytest.approx(2 / 3)
    assert found.gained == 0.5
    assert found.lost_by_chance == pytest.approx(0.6)
    assert found.gained_by_chance == pytest.approx(0.4)
    assert shares(1, 0).transitions(shares(1, 1)) == Transitions(0.5, None, 0.5, 0.5)


def test_what_is_neither_right_nor_wrong_has_no_transitions() -> None:
    assert shares(0.5, 1).transitions(shares(1, 1)) is None
    assert shares(1).transitions(shares(1, 1)) is None
    loss = Scores("loss", np.ones(2), np.ones(2))
    assert loss.transitions(loss) is None


def test_chance_is_what_shuffled_answers_give() -> None:
    random = np.random.default_rng(0)
    before = shares(*(random.random(4000) < 0.7))
    after = shares(*random.permutation(np.arange(4000) < 1200))
    found = after.transitions(before)
    assert found is not None
    assert found.lost == pytest.approx(found.lost_by_chance, abs=0.03)
    assert found.gained == pytest.approx(found.gained_by_chance, abs=0.03)
