"""The choice of a setting: against trying them all, on curves made up for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from surgery.comparison.choose import Choice, Limit, choose, parse_limit
from surgery.comparison.compare import Outcome
from surgery.comparison.grid import coarse_to_fine
from surgery.errors import OptionError

# (retention, forgetting) of a setting's position, from 0 to 1
Curve = Callable[[float], tuple[float | None, float | None]]

COUNT = 101
MONOTONE: dict[str, Curve] = {
    "straight": lambda x: (1 - x, 0.5 - x),
    "late": lambda x: (1 - x**8, 0.2 * (1 - x**3)),
    "early": lambda x: ((1 - x) ** 4, 0.1 * (1 - x) ** 6),
    "a step": lambda x: (0.9 if x < 0.37 else 0.4, 0.3 if x < 0.37 else 0.0),
    "rising": lambda x: (x, 0.4 * x),
    "both better": lambda x: (0.5 + x / 2, 0.3 - 0.3 * x),
    "flat": lambda _: (0.9, 0.02),
}
TURNING: dict[str, Curve] = {
    "a hill": lambda x: (1 - abs(x - 0.6), 0.3 - 0.3 * x),
    "a valley": lambda x: (1 - x, (x - 0.4) ** 2),
    "a hole": lambda x: (1 - x, None if 0.45 < x < 0.55 else 0.4 - 0.4 * x),
    "back and forth": lambda x: (1 - x, 0.2 if int(x * 6) % 2 else 0.0),
}


def outcome(retention: float | None, forgetting: float | None, width: float = 0.01) -> Outcome:
    def around(value: float | None) -> tuple[float, float] | None:
        return None if value is None else (value - width, value + width)

    return Outcome(retention, retention, around(retention), forgetting, forgetting, around(forgetting))


def run(curve: Curve, limit: Limit, *, count: int = COUNT, line: bool = True, most: int | None = None) -> Choice:
    asked: list[int] = []

    def at(place: int) -> Outcome:
        asked.append(place)
        return outcome(*curve(place / max(count - 1, 1)))

    found = choose(count, at, limit, line=line, most=most)
    assert sorted(asked) == sorted(found.tried), "each setting once"
    return found


def best_of_all(curve: Curve, limit: Limit, count: int = COUNT) -> float | None:
    """The best other score of the settings that meet the limit, written out."""
    found = []
    for place in range(count):
        retention, forgetting = curve(place / (count - 1))
        if limit.score == "forgetting":
            if forgetting is not None and forgetting <= limit.bound and retention is not None:
                found.append(retention)
        elif retention is not None and retention >= limit.bound and forgetting is not None:
            found.append(-forgetting)
    return max(found, default=None)


def merit(curve: Curve, limit: Limit, found: Choice, count: int = COUNT) -> float | None:
    if found.best is None:
        return None
    retention, forgetting = curve(found.best / (count - 1))
    assert retention is not None
    assert forgetting is not None
    return retention if limit.score == "forgetting" else -forgetting


LIMITS = [Limit("forgetting", bound) for bound in (-0.2, 0.0, 0.01, 0.05, 0.15, 0.9)]
LIMITS += [Limit("retention", bound) for bound in (0.1, 0.45, 0.8, 0.95, 0.995, 1.2)]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("name", MONOTONE)
def test_bisection_finds_what_trying_all_finds_on_monotone_curves(name: str, limit: Limit) -> None:
    curve = MONOTONE[name]
    found = run(curve, limit)
    assert merit(curve, limit, found) == best_of_all(curve, limit)
    assert found.bisected
    assert len(found.tried) <= 12


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("name", TURNING)
def test_curves_that_turn_are_tried_as_a_whole(name: str, limit: Limit) -> None:
    curve = TURNING[name]
    found = run(curve, limit)
    assert not found.bisected
    assert len(found.tried) == COUNT
    assert merit(curve, limit, found) == best_of_all(curve, limit)


def test_noise_is_no_turn() -> None:
    """A curve that trembles by a fiftieth of its range is bisected, and the choice is as good but for that."""
    tremble = [0.004 * ((place * 37) % 11 - 5) / 5 for place in range(COUNT)]

    def curve(x: float) -> tuple[float, float]:
        return 1 - x, 0.2 * (1 - x) + tremble[round(x * (COUNT - 1))]

    limit = Limit("forgetting", 0.1)
    found = run(curve, limit)
    wanted = best_of_all(curve, limit)
    assert found.bisected
    assert found.best is not None
    assert wanted is not None
    assert limit.met(found.tried[found.best])
    assert wanted - (1 - found.best / (COUNT - 1)) <= 0.03


@pytest.mark.parametrize("count", range(1, 12))
def test_any_number_of_settings(count: int) -> None:
    limit = Limit("forgetting", 0.25)
    found = run(lambda x: (1 - x, 0.5 - x), limit, count=count)
    wanted = [place for place in range(count) if 0.5 - place / max(count - 1, 1) <= 0.25]
    assert found.best == min(wanted, default=None)


def test_nothing_meets_the_limit() -> None:
    found = run(lambda x: (1 - x, 0.5 - 0.3 * x), Limit("forgetting", 0.1))
    assert (found.best, found.nearest, len(found.tried)) == (None, 100, 5)


def test_what_is_on_no_line_is_tried_as_a_whole() -> None:
    found = run(lambda x: (1 - x, 0.5 - x), Limit("forgetting", 0.1), line=False)
    assert (found.best, len(found.tried), found.bisected) == (40, COUNT, False)


def test_a_search_along_a_turning_curve_ends() -> None:
    curve = TURNING["a valley"]
    found = run(curve, Limit("forgetting", 0.01), most=33)
    assert len(found.tried) == 33
    assert found.best == min(place for place in found.tried if (place / 100 - 0.4) ** 2 <= 0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 101])
def test_the_order_is_coarse_to_fine(count: int) -> None:
    order = coarse_to_fine(count)
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][:count]

    def widest(places: Sequence[int]) -> int:
        return max(high - low for low, high in pairwise(sorted(places)))

    for done in (5, 9, 17, 33):
        if done < count:
            assert widest(order[:done]) <= -(-count // (done - 1)) + 1


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("forgetting<=0.01", Limit("forgetting", 0.01)),
        (" retention >= .99 ", Limit("retention", 0.99)),
        ("forgetting<=-1e-3", Limit("forgetting", -0.001)),
    ],
)
def test_limits(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "forgetting>=0.1", "retention<=1", "forgetting<=x", "forgetting<=nan", "loss<=1"])
def test_limits_that_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="`choose` takes"):
        parse_limit(text)


@pytest.mark.parametrize(
    ("limit", "forgetting", "says"),
    [
        (Limit("forgetting", 0.1), 0.08, "0.0700 to 0.0900, all within the limit"),
        (Limit("forgetting", 0.1), 0.095, "0.0850 to 0.1050, so with other items it may not hold"),
        (Limit("retention", 0.85), 0.1, "0.8900 to 0.9100, all within the limit"),
        (Limit("retention", 0.895), 0.1, "0.8900 to 0.9100, so with other items it may not hold"),
        (Limit("forgetting", 0.1), None, "no interval"),
    ],
)
def test_how_sure_it_is(limit: Limit, forgetting: float | None, says: str) -> None:
    assert says in limit.sure(outcome(0.9, forgetting))
