"""The search for the best model, on synthetic scores whose truth is known: who wins, and how often a claim is wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from surgery.comparison.auto import Search
from surgery.comparison.candidates import Candidate
from surgery.comparison.field import Field, deal
from surgery.comparison.proof import Drop
from surgery.comparison.race import Goal
from surgery.comparison.verdict import failure, power_note
from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.bench import Scored
from surgery.evaluation.scores import Kind, Scores
from surgery.evaluation.subject import Subject

COUNT = 200


@dataclass
class Fake:
    """A measure that is never asked: the bench knows the scores."""

    name: str
    kind: Kind
    settings: dict[str, Any] = field(default_factory=dict)

    def score(self, model: Any, advance: Any, only: Sequence[int] | None = None) -> Scores:
        raise AssertionError("nothing is scored here")


TASK, GENERAL = Fake("task", "loss"), Fake("general", "divergence")


class Bench:
    """Knows the true mean loss on the task and the true divergence of each label; items scatter around them."""

    def __init__(self, truth: Mapping[str, tuple[float, float]], seed: int = 0, count: int = COUNT) -> None:
        self.truth, self.count, self.asked = truth, count, list[tuple[str, str, tuple[int, ...]]]()
        random = np.random.default_rng(seed)
        shared = random.standard_normal((2, count))
        # Divergences are skewed: most items are near 0, and a few are far from it.
        self.noise = {
            label: (0.1 * random.standard_normal(count) + 0.3 * shared[0], random.exponential(1.0, count))
            for label in truth
        }

    def fingerprint(self, subject: Subject) -> str:
        return f"weights of {subject.label}"

    def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
        label = subject.label
        loss, divergence = self.truth[label]
        values = {"task": loss + self.noise[label][0], "general": divergence * self.noise[label][1]}
        kinds: dict[str, Kind] = {"task": "loss", "general": "divergence"}
        found = {name: Scores(kinds[name], held, np.ones(self.count)) for name, held in values.items()}
        if only is not None:
            self.asked += [(label, name, tuple(places)) for name, places in only.items()]
            found = {name: found[name].at(places) for name, places in only.items()}
        return Scored(subject, self.fingerprint(subject), found, None, None)


def subject(label: str) -> Subject:
    return Subject(label, SimpleNamespace(), {})  # type: ignore[arg-type]


def candidates(truth: Mapping[str, tuple[float, float]]) -> list[Candidate]:
    labels = [label for label in truth if label != "pre"]
    return [Candidate(label, label.split()[0], lambda label=label: subject(label)) for label in labels]  # type: ignore[misc]


def search(truth: Mapping[str, tuple[float, float]], goal: Goal, **options: Any) -> Search:
    bench: Any = options.pop("bench", None) or Bench(truth, options.pop("noise", 0), options.pop("count", COUNT))
    begun, seconds = time.monotonic(), options.pop("seconds", None)
    ends = [subject("pre"), subject("ft")]
    field = Field(ends, candidates(truth), [TASK], [GENERAL], bench, options.pop("seed", 0))
    return Search(field, goal, begun, math.inf if seconds is None else begun + seconds)


def field_of(count: int = 20) -> dict[str, tuple[float, float]]:
    """A line from pre (loss 2, divergence 0) to ft (loss 1, divergence 0.5), and models behind it."""
    truth = {"pre": (2.0, 0.0), "ft": (1.0, 0.5)}
    for at in np.linspace(0.05, 0.95, count):
        truth[f"line {at:.3f}"] = (2 - at**0.5, 0.5 * at**2)
        truth[f"worse {at:.3f}"] = (2.1 - at**0.5, 0.5 * at)
    return truth


def test_items_are_dealt_into_halves_by_a_seed() -> None:
    halves = deal({"a": 101, "b": 20}, 0)
    for name, count in (("a", 101), ("b", 20)):
        assert sorted([*halves.choose[name], *halves.prove[name]]) == list(range(count))
        assert len(halves.choose[name]) == count // 2
    assert deal({"a": 101, "b": 20}, 0) == halves
    assert deal({"a": 101, "b": 20}, 1) != halves
    with pytest.raises(OptionError, match="a: has 7 items"):
        deal({"a": 7}, 0)


def test_the_winner_is_near_the_best_that_is_truly_within_the_limit() -> None:
    truth = field_of()
    limit = 1 - np.exp(-0.06)
    race = search(truth, Goal("forgetting", limit), count=1000)
    winner = race.prove(race.race())
    assert winner is not None
    loss, divergence = truth[winner.candidate.label]
    within = [held for label, held in truth.items() if held[1] < 0.06 and label.startswith("line")]
    assert divergence < 0.06
    assert loss < min(within)[0] + 0.1


def test_a_limit_on_the_task_gives_the_one_that_forgets_least() -> None:
    truth = field_of()
    race = search(truth, Goal("retention", 0.9), count=1000)
    winner = race.prove(race.race())
    assert winner is not None
    loss, divergence = truth[winner.candidate.label]
    assert 1 - np.exp(1.0 - loss) < 0.1
    assert divergence < truth["ft"][1]


def test_the_knee_is_better_than_both_ends() -> None:
    truth = field_of()
    race = search(truth, Goal("knee"), count=400)
    winner = race.prove(race.race())
    assert winner is not None
    loss, divergence = truth[winner.candidate.label]
    assert (loss - 1) + divergence / 0.5 < 0.7  # 1 for pre and for ft
    assert not race.tests


def test_nothing_that_proves_is_used_to_choose() -> None:
    truth, goal = field_of(), Goal("forgetting", 0.08)
    first = search(truth, goal)
    finalists = [course.candidate.label for course in first.race()]
    bench = Bench(truth)
    for label, (task, general) in bench.noise.items():
        for name, noise in (("task", task), ("general", general)):
            places = first.field.halves.prove[name]
            noise[places] = noise[places[::-1]] * (3 if label.startswith("line") else 0.1)
    other = search(truth, goal, bench=bench)
    assert [course.candidate.label for course in other.race()] == finalists
    first.prove([first.field.courses[label] for label in finalists])
    other.prove([other.field.courses[label] for label in finalists])
    assert first.order == other.order


def test_the_race_asks_for_items_of_one_half_only() -> None:
    race = search(field_of(), Goal("forgetting", 0.08))
    bench: Any = race.field.bench
    bench.asked.clear()
    race.race()
    for _, name, places in bench.asked:
        assert set(places) <= set(race.field.halves.choose[name])


def test_the_race_costs_a_few_evaluations_and_proves_on_all_items() -> None:
    truth = field_of(40)
    race = search(truth, Goal("forgetting", 0.08), count=1000)
    bench: Any = race.field.bench
    finalists = race.race()
    race.prove(finalists)
    race.show_others()
    items = sum(len(places) for _, _, places in bench.asked) / (2 * 1000)
    assert items + 2 <= 10
    assert all(len(held.scores["task"].values) == 500 for held in race.field.proved.values())


@pytest.mark.parametrize("goal", [Goal("forgetting", 0.05), Goal("retention", 0.95)])
def test_a_false_claim_is_made_in_at_most_5_of_100_runs(goal: Goal) -> None:
    """All candidates are just beyond the limit, so every claim is false, but of ft that it keeps its own task score."""
    beyond = -np.log(1 - 0.0501)
    truth = {"pre": (3.0, 0.0), "ft": (1.0, 0.9)}
    truth |= {f"m {at}": (1.0 + beyond, beyond) for at in range(12)}
    runs = 120
    false = 0
    for seed in range(runs):
        race = search(truth, goal, noise=seed, seed=seed, count=120)
        winner = race.prove(race.race())
        false += winner is not None and winner.candidate.label != "ft"
    # 12 of 120 or more would come by chance once in 100 at a true rate of 5%.
    assert false < 12


def test_the_same_seed_gives_the_same_winner() -> None:
    winners = []
    for _ in range(2):
        race = search(field_of(), Goal("forgetting", 0.1))
        winners.append(race.prove(race.race()))
    first, second = winners
    assert first is not None
    assert second is not None
    assert first.candidate.label == second.candidate.label


def test_ft_wins_where_it_forgets_nothing() -> None:
    truth = {"pre": (2.0, 0.0), "ft": (1.0, 0.001), "line 0.9": (1.3, 0.0005), "line 0.5": (1.6, 0.0001)}
    race = search(truth, Goal("forgetting", 0.01))
    winner = race.prove(race.race())
    assert winner is not None
    assert winner.candidate.label == "ft"


def test_a_task_that_ft_has_not_learnt_is_refused() -> None:
    with pytest.raises(OptionError, match="ft is no better than pre on task, so there is no trade-off"):
        search({"pre": (1.0, 0.0), "ft": (1.5, 0.5)}, Goal("knee"))


def test_candidates_that_cannot_be_scored_or_have_the_same_weights_fall_out() -> None:
    truth = field_of(3)

    class Broken(Bench):
        def score(self, subject: Subject, only: Any = None) -> Scored:
            if subject.label == "worse 0.500":
                raise CheckpointError("the weights are broken.")
            return super().score(subject, only)

        def fingerprint(self, subject: Subject) -> str:
            return super().fingerprint(subject).replace("worse 0.950", "line 0.950")

    race = search(truth, Goal("forgetting", 0.1), bench=Broken(truth))
    race.prove(race.race())
    assert race.field.courses["worse 0.500"].why == "the weights are broken."
    assert race.field.courses["worse 0.950"].why == "has the weights of line 0.950"


def test_a_time_limit_ends_the_race_with_a_proof() -> None:
    race = search(field_of(), Goal("forgetting", 0.1), seconds=0.0)
    winner = race.prove(race.race())
    assert max(course.round for course in race.field.courses.values()) == 1
    assert winner is None or winner.candidate.label in race.field.proved


def test_failure_says_what_it_would_take() -> None:
    race = search({"pre": (2.0, 0.0), "ft": (1.0, 0.5), "line 0.5": (1.4, 0.0099)}, Goal("forgetting", 0.01), count=60)
    assert race.prove(race.race()) is None
    label, p = race.tests[0]
    drops = race._limited(race.field.proved_standing(race.field.courses[label]))
    said = failure(race.goal, label, p, drops)
    assert said.startswith("No model could be proved to be one that forgets at most 1.00%, so nothing was written.")
    assert "a limit of at most " in said
    bound = float(said.rpartition("at most ")[2].rstrip("%."))
    again = search(race.field.bench.truth, Goal("forgetting", bound / 100), bench=race.field.bench)  # type: ignore[attr-defined]
    assert again.prove(again.race()) is not None


def test_too_few_items_are_told_beforehand() -> None:
    right = np.ones(200)
    flipped = np.where(np.arange(200) < 10, 0.0, 1.0)
    drops = [Drop("share", flipped, right, right)]
    assert power_note(Goal("forgetting", 0.2), drops, 100) is None
    told = power_note(Goal("forgetting", 0.01), drops, 100)
    # Half a percent of the items flips: (1.645 + 0.842)² · 0.0048 / 0.005² of them prove, and as many choose.
    assert told is not None
    needed = int(told.partition("takes about ")[2].partition(" ")[0].replace(",", ""))
    assert needed == pytest.approx(2 * (1.645 + 0.842) ** 2 * 0.05 * 0.95 * 0.1 / 0.005**2, rel=0.02)
    assert told.endswith("there are 200.")


def test_a_task_on_which_ft_has_nothing_right_is_refused_and_few_right_answers_are_no_trouble() -> None:
    class Accuracy(Bench):
        def score(self, subject: Subject, only: Any = None) -> Scored:
            found = super().score(subject)
            share = self.truth[subject.label][0]
            right = (np.random.default_rng(1).random(self.count) < share).astype(float)
            scores = found.scores | {"task": Scores("share", right, np.ones(self.count))}
            scores = scores if only is None else {name: scores[name].at(places) for name, places in only.items()}
            return Scored(subject, found.fingerprint, scores, None, None)

    truth = {"pre": (0.01, 0.0), "ft": (0.12, 0.5), "line 0.5": (0.11, 0.05), "line 0.9": (0.02, 0.01)}
    accuracy = Fake("task", "share")
    ends = [subject("pre"), subject("ft")]
    bench: Any = Accuracy(truth, count=400)
    race = Search(Field(ends, candidates(truth), [accuracy], [GENERAL], bench, 0), Goal("knee"))
    winner = race.prove(race.race())
    assert winner is not None
    assert winner.candidate.label == "line 0.5"
    nothing: Any = Accuracy(truth | {"ft": (0.0, 0.5)})
    with pytest.raises(OptionError, match="ft scores 0 on task, so there is nothing to keep"):
        Field(ends, [], [accuracy], [GENERAL], nothing, 0)


def test_ctrl_c_says_how_the_race_stood() -> None:
    race = search(field_of(), Goal("forgetting", 0.08))
    bench: Any = race.field.bench
    real, asked = bench.score, list[None]()

    def score(subject: Subject, only: Any = None) -> Scored:
        asked.append(None)
        if len(asked) > 60:
            raise KeyboardInterrupt
        found: Scored = real(subject, only)
        return found

    bench.score = score
    with pytest.raises(KeyboardInterrupt):
        race.prove(race.race())
    race.stopped = True
    said = race._sentence(None, [])
    assert said.startswith("It was stopped before anything was proved, and nothing was written. Ahead was ")


def test_too_few_items_are_refused_before_anything_is_scored() -> None:
    @dataclass
    class Small(Fake):
        count: int = 6

    class Untouched:
        def fingerprint(self, subject: Subject) -> str:
            raise AssertionError("nothing is read")

        def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
            raise AssertionError("nothing is scored")

    with pytest.raises(OptionError, match="task: has 6 items"):
        Field([subject("pre"), subject("ft")], [], [Small("task", "loss")], [GENERAL], Untouched(), 0)
