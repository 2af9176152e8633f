"""The candidates of a search, and what was measured on each: on one half of the items to choose, on the other to prove."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from surgery.comparison.candidates import Candidate
from surgery.comparison.proof import Drop
from surgery.comparison.race import Standing
from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.bench import Scored
from surgery.evaluation.scores import Counted, Measure, Scores, joined
from surgery.evaluation.subject import Subject

FT = "ft"
FEWEST = 4  # items of each measure in the first round
LEAST = 8  # items that a measure must have

Names = Mapping[str, list[int]]


class Scorer(Protocol):
    """Scores models: a bench, or an object that has their scores already."""

    def fingerprint(self, subject: Subject) -> str:
        """The fingerprint of a model's weights."""

    def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
        """The scores of a model on all items, or on some; see `surgery.evaluation.bench.Bench.score`."""


@dataclass(frozen=True)
class Halves:
    """Positions of items by the names of the measures: those to choose on, in the order of the race, and those that prove."""

    choose: Names
    prove: Names


@dataclass
class Course:
    """The way of a candidate through the race."""

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
        _check_enough(name, count)
        order = sorted(range(count), key=lambda place: hashlib.sha256(f"{seed} {name} {place}".encode()).digest())
        choose[name], prove[name] = order[: count // 2], order[count // 2 :]
    return Halves(choose, prove)


def _check_enough(name: str, count: int) -> None:
    if count < LEAST:
        raise OptionError(
            f"{name}: has {count} items, and to choose on one half and prove on the other takes {LEAST} or more. Give more."
        )


class Field:
    """Candidates and their scores.

    Args:
        subjects: pre and ft, which are scored here on all items.
        candidates: with labels that differ; "ft" is ft itself.
        tasks, general: the measures.
        bench: scores models.
        seed: of the halves.

    Attributes:
        pre, ft: their scores on all items.
        spent: how many times one model was scored on all items, or as much on some.
        halves: of the items.
        courses: the candidates by label.
        proved: the scores of those that were measured on the second half.

    Raises:
        OptionError: pre and ft are the same, a measure has too few items, or ft scores nothing on a task.
        SurgeryError: pre or ft cannot be scored.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        candidates: Sequence[Candidate],
        tasks: Sequence[Measure],
        general: Sequence[Measure],
        bench: Scorer,
        seed: int,
    ) -> None:
        self.bench, self.tasks, self.general = bench, tasks, general
        for measure in (*tasks, *general):  # before anything is scored, where it is known
            if isinstance(measure, Counted):
                _check_enough(measure.name, measure.count)
        if bench.fingerprint(subjects[1]) == bench.fingerprint(subjects[0]):
            raise OptionError("pre and ft hold the same weights, so there is nothing to repair. Check both paths.")
        self.pre = bench.score(subjects[0])
        begun = time.monotonic()
        self.ft = bench.score(subjects[1])
        self._alone, self._busy, self._raced, self.spent = time.monotonic() - begun, 0.0, 0.0, 2.0
        self.halves = deal({name: len(scores.values) for name, scores in self.pre.scores.items()}, seed)
        self.courses = {candidate.label: Course(candidate) for candidate in candidates}
        self.proved = {FT: replace(self.ft, scores=cut(self.ft.scores, self.halves.prove))}
        if FT in self.courses:  # was scored on all items
            self.courses[FT].seen = cut(self.ft.scores, self.halves.choose)
        self._weights = {self.ft.fingerprint: FT} if FT in self.courses else {}
        for task in tasks:
            if task.kind == "share" and not self.ft.scores[task.name].at(self.halves.choose[task.name]).mean > 0:
                raise OptionError(
                    f"ft scores 0 on {task.name}, so there is nothing to keep. Check that the file and the metric are those of "
                    "the fine-tuned task; `surgery compare --json` shows its answers."
                )

    def see(self, left: Sequence[Course], names: Names, number: int, late: Callable[[], bool]) -> list[Course] | None:
        """Score candidates on the first items of the first half, in a round of the race.

        Args:
            left: the candidates.
            names: the items, of which those that a candidate saw before are not measured again.
            number: of the round.
            late: whether there is no more time.

        Returns:
            Those that could be scored; None where time ran out.
        """
        done = []
        for course in left:
            if number > 1 and late():
                return None
            todo = {
                name: places[have:]
                for name, places in names.items()
                if (have := len(course.seen[name].values) if name in course.seen else 0) < len(places)
            }
            if todo:
                begun = time.monotonic()
                subject = self.subject(course.candidate, quick=True)
                try:
                    same = self._weights.setdefault(self.bench.fingerprint(subject), course.candidate.label)
                    if same != course.candidate.label:
                        course.why = f"has the weights of {same}"
                        continue
                    found = self.bench.score(subject, todo)
                    self._busy += time.monotonic() - begun
                    self._raced += self._part(todo)
                    self.spent += self._part(todo)
                except CheckpointError as error:
                    course.why = str(error)
                    continue
                for name, scores in found.scores.items():
                    course.seen[name] = joined([course.seen[name], scores]) if name in course.seen else scores
            course.round = number
            done.append(course)
        return done

    def prove(self, course: Course) -> Scored:
        """A candidate on the second half."""
        label = course.candidate.label
        if label not in self.proved:
            self.proved[label] = self.bench.score(self.subject(course.candidate), self.halves.prove)
            self.spent += self._part(self.halves.prove)
        return self.proved[label]

    @property
    def seconds(self) -> float:
        """Seconds to score one model on all items, estimated from what was seen so far: ft's scores may have been kept."""
        return max(self._alone, self._busy / self._raced) if self._raced else self._alone

    def _part(self, names: Names) -> float:
        """How much of all items these are."""
        return sum(map(len, names.values())) / sum(len(scores.values) for scores in self.pre.scores.values())

    def subject(self, candidate: Candidate, *, quick: bool = False) -> Subject:
        """A candidate, opened.

        Args:
            quick: without its distance from pre, for which all its tensors may have to be made once more.
        """
        subject = candidate.subject()
        if candidate.recipe is not None:
            made = {"pre": self.pre.fingerprint, "ft": self.ft.fingerprint, **candidate.recipe}
            subject = replace(subject, recipe=made)
        return replace(subject, against=lambda: (None, None)) if quick else subject

    def first(self, seen: float) -> Names:
        """The first items of each measure's first half."""
        return {
            name: places[: min(len(places), max(FEWEST, math.ceil(seen * len(places))))]
            for name, places in self.halves.choose.items()
        }

    def seen(self, course: Course) -> Names:
        """The items of the first half that a candidate has seen."""
        return {name: places[: len(course.seen[name].values)] for name, places in self.halves.choose.items()}

    def standing_of(self, course: Course, names: Names) -> Standing:
        """Where a candidate stands on the first items of the first half."""
        own = {name: scores.at(range(len(names[name]))) for name, scores in course.seen.items()}
        return replace(self.standing(own, names), line=course.candidate.line, place=course.candidate.place)

    def proved_standing(self, course: Course) -> Standing:
        """Where a candidate stands on the second half."""
        own, prove = self.prove(course).scores, self.halves.prove
        lost = [
            Drop.between(own[one.name], self.ft.scores[one.name].at(prove[one.name]), relative=True)
            for one in self.tasks
        ]
        return Standing(lost, self._forgot(own, prove))

    def standing(self, own: Mapping[str, Scores], names: Names) -> Standing:
        """Where a model stands on some items of the first half, of which its scores are."""
        return Standing(
            [self._lost(one, own[one.name], names[one.name]) for one in self.tasks], self._forgot(own, names)
        )

    def _forgot(self, own: Mapping[str, Scores], names: Names) -> list[Drop]:
        return [Drop.between(own[one.name], self.pre.scores[one.name].at(names[one.name])) for one in self.general]

    def _lost(self, task: Measure, own: Scores, places: Sequence[int]) -> Drop:
        """The loss of a model on a task against ft, as a share of what ft scores on the whole first half.

        On a few items ft may have nothing right.
        """
        ft = self.ft.scores[task.name].at(places)
        if task.kind != "share":
            return Drop.between(own, ft)
        whole = self.ft.scores[task.name].at(self.halves.choose[task.name]).mean
        return Drop.between(replace(own, values=own.values / whole), replace(ft, values=ft.values / whole))


def cut(scores: Mapping[str, Scores], names: Names) -> dict[str, Scores]:
    """A model's scores on some of the items."""
    return {name: scores[name].at(places) for name, places in names.items()}
