"""Find the best model between pre and ft, and prove what is said of it (`surgery auto`).

The items of every measure are dealt into two halves by a seeded hash. On one of them many candidates race
(`surgery.comparison.race`); the few that are left are tested on the other (`surgery.comparison.proof`), safest first, in an
order that was fixed before. The winner is the best, by the first half, of those that pass. Nothing that proves is used to choose.

The whole costs about as much as ten evaluations of one model on all items: pre and ft, the race, and on the second half the
finalists and the best of each other method, for comparison.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from surgery.comparison.candidates import Candidate
from surgery.comparison.compare import Plane, document
from surgery.comparison.proof import LEVEL, Drop, certify, mean_drop, p_beyond
from surgery.comparison.race import FINALISTS, Goal, Standing, rounds, sift
from surgery.comparison.verdict import failure, success
from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.bench import Scored
from surgery.evaluation.scores import Measure, Scores, joined
from surgery.evaluation.subject import Subject

FT = "ft"
RACE = 4.0  # evaluations on half of the items
FEWEST = 4  # items of each measure in the first round
LEAST = 8  # items that a measure must have
STOPPED = "It was stopped before anything was proved: what is here was chosen on few items, and nothing was written."

Names = Mapping[str, list[int]]


class Scorer(Protocol):
    """What scores models: a bench, or what has their scores already."""

    def fingerprint(self, subject: Subject) -> str:
        """The fingerprint of a model's weights."""

    def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
        """The scores of a model on all items, or on some; see `surgery.evaluation.bench.Bench.score`."""


@dataclass(frozen=True)
class Halves:
    """Positions of items by the names of the measures: those to choose on, in the order of the race, and those that prove."""

    choose: Names
    prove: Names


@dataclass(frozen=True)
class Round:
    """How the race stands after a round.

    Attributes:
        number, of: which round it was.
        left: candidates that go on, of `candidates`.
        items: of the measure with the most, seen by each of them.
        leader: the best so far; it keeps `kept` of ft's task score, and forgot `forgot`.
        seconds: that the rest will take, about.
    """

    number: int
    of: int
    left: int
    candidates: int
    items: int
    leader: str
    kept: float
    forgot: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        document: what results.json holds.
        winner: None where no candidate was proved to meet the limit, or it was stopped.
    """

    document: dict[str, Any]
    winner: Candidate | None


@dataclass
class Course:
    """What became of a candidate."""

    candidate: Candidate
    seen: dict[str, Scores] = field(default_factory=dict)
    round: int = 0
    rank: int = 0
    why: str = ""


def deal(counts: Mapping[str, int], seed: int) -> Halves:
    """Two halves of each measure's items, in an order that a hash of the seed decides.

    Raises:
        OptionError: a measure has too few items.
    """
    choose, prove = dict[str, list[int]](), dict[str, list[int]]()
    for name, count in counts.items():
        if count < LEAST:
            raise OptionError(
                f"{name}: has {count} items, and to choose on one half and prove on the other takes {LEAST} or more. Give more."
            )
        order = sorted(range(count), key=lambda place: hashlib.sha256(f"{seed} {name} {place}".encode()).digest())
        choose[name], prove[name] = order[: count // 2], order[count // 2 :]
    return Halves(choose, prove)


def auto(
    subjects: Sequence[Subject],
    candidates: Sequence[Candidate],
    tasks: Sequence[Measure],
    general: Sequence[Measure],
    bench: Scorer,
    goal: Goal,
    *,
    seed: int = 0,
    seconds: float | None = None,
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
    tell: Callable[[Round], None] = lambda _: None,
) -> Found:
    """Let candidates race, and prove the best.

    Args:
        subjects: pre and ft.
        candidates: with labels that differ; "ft" is ft itself.
        tasks, general: the measures, which are those of the bench.
        seed: of the halves.
        seconds: that all may take; the race ends in time for the proof.
        command: what the user typed.
        notes: to be shown with the result.
        tell: called after each round.

    Raises:
        OptionError: ft is no better than pre on the task and there is no limit, or there are too few items.
        SurgeryError: pre or ft cannot be scored.
        KeyboardInterrupt: Ctrl-C before pre and ft were done.
    """
    search = Search(subjects, candidates, tasks, general, bench, goal, seed, seconds, tell)
    winner: Course | None = None
    try:
        finalists = search.race()
        winner = search.prove(finalists)
        search.show_others()
    except KeyboardInterrupt:
        search.stopped, winner = True, None
    return Found(search.document(winner, command, notes), None if winner is None else winner.candidate)


class Search:
    """One run of `auto`; see there.

    Attributes:
        stopped: it was interrupted, so that nothing is proved.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        candidates: Sequence[Candidate],
        tasks: Sequence[Measure],
        general: Sequence[Measure],
        bench: Scorer,
        goal: Goal,
        seed: int,
        seconds: float | None,
        tell: Callable[[Round], None],
    ) -> None:
        self.bench, self.goal, self.tell, self.tasks, self.general = bench, goal, tell, tasks, general
        self.begun = time.monotonic()
        self.deadline = math.inf if seconds is None else self.begun + seconds
        self.pre = bench.score(subjects[0])
        before = time.monotonic()
        self.ft = bench.score(subjects[1])
        self.one = time.monotonic() - before
        self.halves = deal({name: len(scores.values) for name, scores in self.pre.scores.items()}, seed)
        self.courses = {candidate.label: Course(candidate) for candidate in candidates}
        self.proved = {FT: replace(self.ft, scores=self._cut(self.ft.scores, self.halves.prove))}
        if FT in self.courses:  # was scored on all items
            self.courses[FT].seen = self._cut(self.ft.scores, self.halves.choose)
        self.weights = {self.ft.fingerprint: FT} if FT in self.courses else {}
        self.tests: list[tuple[str, float]] = []
        self.order: list[str] = []
        self.stopped = False
        self.scale = self._scale()

    def _scale(self) -> tuple[float, float]:
        """What pre lacks of the task, and ft of general ability, on the half that is for choosing.

        Raises:
            OptionError: pre lacks nothing, so that there is no trade-off.
        """
        ends = [
            self._standing(self._cut(model, self.halves.choose), self.halves.choose)
            for model in (self.pre.scores, self.ft.scores)
        ]
        lost, forgot = mean_drop(ends[0].lost)[0], mean_drop(ends[1].forgot)[0]
        if self.goal.limit == "knee" and not lost > 0:
            names = ", ".join(measure.name for measure in self.tasks)
            raise OptionError(
                f"ft is no better than pre on {names}, so there is no trade-off. Give a limit, or check that the file and the "
                "metric are those of the fine-tuned task."
            )
        return lost, forgot

    def race(self) -> list[Course]:
        """The finalists, which have seen all items of the first half, the best first."""
        left = [course for course in self.courses.values() if not course.candidate.after]
        waiting = [course for course in self.courses.values() if course.candidate.after]
        plan = rounds(len(left), RACE)
        for number, (_, seen) in enumerate(plan, 1):
            last = number == len(plan)
            names = self._first(1.0 if last else seen)
            keep = FINALISTS if last else plan[number][0]
            if not last and len(left) <= FINALISTS:
                continue
            done = self._see(left, names, number)
            if done is None:  # no time: the order of the round before is the last word
                left = left[:FINALISTS]
                break
            left = self._sift(done, names, number, keep)
            self._tell(number, len(plan), left, names)
            if number < len(plan) - 1:  # the last rounds are to decide
                ahead = {course.candidate.label for course in left[: max(FINALISTS, len(left) // 2)]}
                entering = [course for course in waiting if ahead & set(course.candidate.after)]
                waiting = [course for course in waiting if course not in entering]
                left += entering
        for course in waiting:
            course.why = "its neighbours were behind"
        return left

    def _see(self, left: Sequence[Course], names: Names, number: int) -> list[Course] | None:
        """Score candidates on the first items of the first half; None where there is no time for it."""
        reserve = (FINALISTS + self._methods()) / 2 * self.one
        done = []
        for course in left:
            if time.monotonic() + reserve > self.deadline and number > 1:
                return None
            todo = {
                name: places[have:]
                for name, places in names.items()
                if (have := len(course.seen[name].values) if name in course.seen else 0) < len(places)
            }
            if todo:
                subject = self._subject(course.candidate, quick=True)
                try:
                    same = self.weights.setdefault(self.bench.fingerprint(subject), course.candidate.label)
                    if same != course.candidate.label:
                        course.why = f"has the weights of {same}"
                        continue
                    found = self.bench.score(subject, todo)
                except CheckpointError as error:
                    course.why = str(error)
                    continue
                for name, scores in found.scores.items():
                    course.seen[name] = joined([course.seen[name], scores]) if name in course.seen else scores
            course.round = number
            done.append(course)
        return done

    def _sift(self, left: Sequence[Course], names: Names, number: int, keep: int) -> list[Course]:
        """Those that go on, the best first."""
        standings = {}
        for course in left:
            try:
                standings[course.candidate.label] = self._of(course, names)
            except ValueError:
                course.why = "reads the text in other tokens than ft"
        if not standings:
            raise CheckpointError(f"No candidate could be scored: {left[0].why if left else 'see the notes'}.")
        limited = self.tasks if self.goal.limit == "retention" else self.general
        ahead = math.sqrt(max(len(names[one.name]) / len(self.halves.prove[one.name]) for one in limited))
        kept, fallen = sift(standings, self.goal, self.scale, keep, ahead=ahead)
        for place, label in enumerate([*kept, *fallen]):
            self.courses[label].rank = place
            self.courses[label].why = fallen.get(label, "")
        return [self.courses[label] for label in kept]

    def prove(self, finalists: Sequence[Course]) -> Course | None:
        """The winner: the best, by the first half, of the finalists that the second half proves to be within the limit."""
        standings = {course.candidate.label: self._of(course, self._seen(course)) for course in finalists}
        merits = {
            label: self.goal.merit(mean_drop(held.lost)[0], mean_drop(held.forgot)[0], self.scale)
            for label, held in standings.items()
        }
        if self.goal.limit == "knee":
            best = max(merits, key=merits.__getitem__)
            self._prove(self.courses[best])
            for course in finalists:
                self._prove(course)
            return self.courses[best]
        self.order = sorted(standings, key=lambda label: self._safety(standings[label]), reverse=True)
        passed, values = certify(self.order, self._p)
        self.tests = list(zip(self.order, values, strict=False))
        for course in finalists:
            self._prove(course)
        return self.courses[max(passed, key=merits.__getitem__)] if passed else None

    def _p(self, label: str) -> float:
        """The p-value of the hypothesis that a finalist is beyond the limit, on the second half."""
        standing = self._standing(self._prove(self.courses[label]).scores, self.halves.prove)
        return p_beyond(self._limited(standing), self.goal.most)

    def _safety(self, standing: Standing) -> tuple[bool, float]:
        """What the safest has most of: being within the limit, by most standard errors; beyond it, the smallest excess."""
        value, error = mean_drop(self._limited(standing))
        room = self.goal.most - value
        return room > 0, room / max(error, 1e-12) if room > 0 else room

    def _limited(self, standing: Standing) -> Sequence[Drop]:
        return standing.lost if self.goal.limit == "retention" else standing.forgot

    def show_others(self) -> None:
        """Score the best of each method that has no finalist on the second half, as far as there is time."""
        for course in self._best():
            if time.monotonic() + self.one / 2 > self.deadline:
                return
            self._prove(course)

    def _best(self) -> list[Course]:
        """The best candidate of each method: the one that got furthest."""
        found: dict[str | None, Course] = {}
        for course in sorted(self.courses.values(), key=lambda course: (-course.round, course.rank)):
            if course.round and course.candidate.method is not None:
                found.setdefault(course.candidate.method, course)
        return list(found.values())

    def _methods(self) -> int:
        return len({course.candidate.method for course in self.courses.values()})

    def _prove(self, course: Course) -> Scored:
        """A candidate on the second half."""
        label = course.candidate.label
        if label not in self.proved:
            self.proved[label] = self.bench.score(self._subject(course.candidate), self.halves.prove)
        return self.proved[label]

    def _subject(self, candidate: Candidate, *, quick: bool = False) -> Subject:
        """A candidate, opened.

        Args:
            quick: without its distance from pre, for which all its tensors may have to be made once more.
        """
        subject = candidate.subject()
        if candidate.recipe is not None:
            made = {"pre": self.pre.fingerprint, "ft": self.ft.fingerprint, **candidate.recipe}
            subject = replace(subject, recipe=made)
        return replace(subject, against=lambda: (None, None)) if quick else subject

    def _first(self, seen: float) -> Names:
        """The first items of each measure's first half."""
        return {
            name: places[: min(len(places), max(FEWEST, math.ceil(seen * len(places))))]
            for name, places in self.halves.choose.items()
        }

    def _seen(self, course: Course) -> Names:
        return {name: places[: len(course.seen[name].values)] for name, places in self.halves.choose.items()}

    def _of(self, course: Course, names: Names) -> Standing:
        """Where a candidate stands on the first items of the first half."""
        cut = {name: scores.at(range(len(names[name]))) for name, scores in course.seen.items()}
        return replace(self._standing(cut, names), line=course.candidate.line, place=course.candidate.place)

    def _standing(self, own: Mapping[str, Scores], names: Names) -> Standing:
        """Where a model stands on some items, of which its scores are."""
        ft, pre = self._cut(self.ft.scores, names), self._cut(self.pre.scores, names)
        return Standing(
            [Drop.between(own[one.name], ft[one.name], relative=True) for one in self.tasks],
            [Drop.between(own[one.name], pre[one.name]) for one in self.general],
        )

    @staticmethod
    def _cut(scores: Mapping[str, Scores], names: Names) -> dict[str, Scores]:
        return {name: scores[name].at(places) for name, places in names.items()}

    def _tell(self, number: int, of: int, left: Sequence[Course], names: Names) -> None:
        standing = self._of(left[0], names)
        rest = (FINALISTS + self._methods()) / 2 * self.one + (of - number) / of * RACE / 2 * self.one
        self.tell(
            Round(
                number,
                of,
                len(left),
                len(self.courses),
                max(map(len, names.values())),
                left[0].candidate.label,
                1 - mean_drop(standing.lost)[0],
                mean_drop(standing.forgot)[0],
                rest,
            )
        )

    def document(self, winner: Course | None, command: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
        """Everything that was found: the comparison on the second half, the race, and the claim."""
        seconds = time.monotonic() - self.begun
        prove = self.halves.prove
        pre, ft = replace(self.pre, scores=self._cut(self.pre.scores, prove)), self.proved[FT]
        rows = [scored for label, scored in self.proved.items() if label != FT]
        if winner is not None:
            rows.sort(key=lambda scored: scored.subject.label != winner.candidate.label)
        made = document(
            Plane(pre, ft, self.tasks, self.general), rows, kind="auto", command=command, notes=notes, seconds=seconds
        )
        made["stopped"] = self.stopped
        made["auto"] = {
            "goal": {"limit": self.goal.limit, "bound": self.goal.bound if self.goal.limit != "knee" else None},
            "winner": None if winner is None else winner.candidate.label,
            "sentence": self._sentence(winner, made["rows"]),
            "tests": [{"label": label, "p": p} for label, p in self.tests],
            "level": LEVEL,
            "commands": [list(words) for words in winner.candidate.commands] if winner else [],
            "items": {
                name: {"choose": len(self.halves.choose[name]), "prove": len(places)} for name, places in prove.items()
            },
            "evaluations": seconds / self.one if self.one > 0 else None,
            "candidates": [self._line(course) for course in self.courses.values()],
        }
        return made

    def _line(self, course: Course) -> dict[str, Any]:
        """What the race shows of a candidate."""
        kept = forgot = None
        if course.seen:
            names = self._seen(course)
            try:
                standing = self._of(course, names)
                kept, forgot = 1 - mean_drop(standing.lost)[0], mean_drop(standing.forgot)[0]
            except ValueError:
                pass
        return {
            "label": course.candidate.label,
            "method": course.candidate.method,
            "commands": [list(words) for words in course.candidate.commands],
            "round": course.round,
            "items": max((len(scores.values) for scores in course.seen.values()), default=0),
            "retention": kept if kept is not None and math.isfinite(kept) else None,
            "forgetting": forgot if forgot is not None and math.isfinite(forgot) else None,
            "why": course.why,
        }

    def _sentence(self, winner: Course | None, rows: Sequence[dict[str, Any]]) -> str:
        """The result in plain words."""
        if self.stopped:
            return STOPPED
        if winner is None:
            label, p = self.tests[0]
            standing = self._standing(self.proved[label].scores, self.halves.prove)
            return failure(self.goal, label, p, self._limited(standing))
        label = winner.candidate.label
        row = next(row for row in rows if row["label"] == label)
        items = sum(map(len, self.halves.prove.values()))
        return success(self.goal, row, items, dict(self.tests).get(label), self.scale)
