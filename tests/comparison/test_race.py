"""The race: who is dropped, on synthetic scores whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.comparison.proof import Drop
from surgery.comparison.race import FINALISTS, Goal, Standing, rounds, sift

SCALE = (0.5, 0.4)


def standing(
    random: np.random.Generator,
    lost: float,
    forgot: float,
    *,
    count: int = 100,
    noise: float = 0.05,
    line: str | None = None,
    place: float = 0.0,
) -> Standing:
    """A candidate with true drops, measured on items that are noisy around them; items are shared through the reference."""

    def drop(value: float) -> Drop:
        mean = -np.log1p(-value)
        return Drop("loss", mean + noise * random.standard_normal(count), np.zeros(count), np.ones(count))

    return Standing([drop(lost)], [drop(forgot)], line, place)


def test_the_best_within_the_limit_goes_on_first() -> None:
    random = np.random.default_rng(0)
    field = {
        "safe": standing(random, 0.3, 0.001),
        "best": standing(random, 0.05, 0.05),
        "beyond": standing(random, 0.0, 0.35),
        "worse": standing(random, 0.2, 0.08),
    }
    kept, fallen = sift(field, Goal("forgetting", 0.1), SCALE, keep=2)
    assert kept[0] == "best"
    assert fallen["beyond"] == "surely beyond the limit"
    assert fallen["worse"] == "best keeps more and forgets less"


def test_a_limit_on_retention_looks_at_the_task() -> None:
    random = np.random.default_rng(0)
    field = {"loses": standing(random, 0.3, 0.0), "keeps": standing(random, 0.005, 0.1)}
    kept, fallen = sift(field, Goal("retention", 0.98), SCALE, keep=2)
    assert (kept, fallen) == (["keeps"], {"loses": "surely beyond the limit"})


def test_the_knee_is_between_both_ends() -> None:
    random = np.random.default_rng(0)
    field = {
        "pre": standing(random, 0.5, 0.0),
        "ft": standing(random, 0.0, 0.4),
        "knee": standing(random, 0.05, 0.06),
    }
    assert sift(field, Goal("knee"), SCALE, keep=1)[0] == ["knee"]


def test_one_that_chance_put_just_beyond_the_limit_goes_on_while_there_are_many() -> None:
    scatter = np.linspace(-0.2, 0.2, 9)  # a standard error of 0.046

    def measured(lost: float, forgot: float) -> Standing:
        drops = [Drop("loss", scatter - np.log1p(-value), np.zeros(9), np.ones(9)) for value in (lost, forgot)]
        return Standing([drops[0]], [drops[1]])

    field = {f"safe {step}": measured(0.1 + 0.001 * step, 0.02) for step in range(11)} | {
        "unlucky": measured(0.0, 0.12)
    }
    assert "unlucky" in sift(field, Goal("forgetting", 0.1), SCALE, keep=6)[0]
    assert "unlucky" not in sift(field, Goal("forgetting", 0.1), SCALE, keep=FINALISTS)[0]


def test_where_nobody_is_within_the_limit_the_nearest_go_on() -> None:
    random = np.random.default_rng(0)
    field = {f"c{step}": standing(random, 0.1, 0.1 * step) for step in range(2, 6)}
    kept, _ = sift(field, Goal("forgetting", 0.01), SCALE, keep=1)
    assert kept == ["c2"]


def test_equal_candidates_are_seldom_called_worse() -> None:
    """Twenty candidates that are all alike: in 95 of 100 races none is said to be dominated or beyond."""
    random, wrong = np.random.default_rng(2), 0
    for _ in range(200):
        field = {f"c{number}": standing(random, 0.1, 0.1, count=16) for number in range(20)}
        _, fallen = sift(field, Goal("forgetting", 0.1), SCALE, keep=20)
        wrong += bool(fallen)
    assert wrong / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_neighbours_along_a_line_inform_each_other() -> None:
    """The best of a smooth line is found more often with its neighbours' scores than by its own alone."""
    random, hits = np.random.default_rng(4), {True: 0, False: 0}
    truth = {place: 0.1 + 0.4 * (place - 0.6) ** 2 for place in np.linspace(0, 1, 11)}
    for _ in range(150):
        for smooth in hits:
            field = {
                f"{place:.1f}": standing(
                    random, value, 0.1, count=12, noise=0.1, line="line" if smooth else None, place=place
                )
                for place, value in truth.items()
            }
            kept, _ = sift(field, Goal("forgetting", 0.5), SCALE, keep=1)
            hits[smooth] += abs(float(kept[0]) - 0.6) < 0.15
    assert hits[True] > hits[False]


def test_rounds_halve_the_candidates_and_cost_the_same() -> None:
    plan = rounds(60, 8.0)
    assert [count for count, _ in plan] == [60, 30, 15, 8, 4]
    seen = [share for _, share in plan]
    cost = [count * (now - before) for (count, now), before in zip(plan, [0.0, *seen], strict=False)]
    assert cost[:4] == pytest.approx([8 / 5] * 4)
    assert sum(cost) <= 8 + 1e-9
    assert max(seen) <= 1
