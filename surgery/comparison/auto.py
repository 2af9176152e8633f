"""Find the best model between pre and ft, and prove what is said of it (`surgery auto`).

The items of every measure are dealt into two halves by a seeded hash. On one of them many candidates race
(`surgery.comparison.race`); the few that are left are tested on the other (`surgery.comparison.proof`), safest first, in an
order that was fixed before. The winner is the best, by the first half, of those that pass. Nothing that proves is used to choose.

The whole costs about as much as ten evaluations of one model on all items: pre and ft, the race, and on the second half the
finalists and, as far as that goes, the best of each other method, for comparison.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from surgery.comparison.candidates import Candidate
from surgery.comparison.compare import Plane, document
from surgery.comparison.field import FT, Course, Field, Names, Scorer, cut
from surgery.comparison.proof import LEVEL, Drop, certify, mean_drop, p_beyond
from surgery.comparison.race import FINALISTS, Goal, Standing, rounds, sift
from surgery.comparison.verdict import failure, power_note, success
from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.scores import Measure
from surgery.evaluation.subject import Subject
from surgery.text import share

BUDGET = 10.0  # evaluations of one model on all items
RACE = 4.0  # evaluations on half of the items


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
    """The result of a search.

    Attributes:
        document: what results.json holds.
        winner: None where no candidate was proved to meet the limit, or it was stopped.
    """

    document: dict[str, Any]
    winner: Candidate | None


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
    tell: Callable[[Round | str], None] = lambda _: None,
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
        tell: called after each round; before the first with a sentence, where there are too few items for the limit.

    Raises:
        OptionError: ft is no better than pre on the task and there is no limit, or there are too few items.
        SurgeryError: pre or ft cannot be scored.
        KeyboardInterrupt: Ctrl-C before pre and ft were done.
    """
    begun = time.monotonic()
    field = Field(subjects, candidates, tasks, general, bench, seed)
    search = Search(field, goal, begun, math.inf if seconds is None else begun + seconds, tell)
    winner: Course | None = None
    if too_few := search.too_few():
        tell(too_few)
        notes = [*notes, too_few]
    try:
        winner = search.prove(search.race())
    except KeyboardInterrupt:
        search.stopped = True
    else:
        with suppress(KeyboardInterrupt):  # what wins is known already
            search.show_others()
    return Found(search.document(winner, command, notes), None if winner is None else winner.candidate)


class Search:
    """One run of `auto`; see there.

    Args:
        field: the candidates.
        begun, deadline: when the run began, and when it has to end, by the monotonic clock.

    Attributes:
        stopped: it was interrupted, so that nothing is proved.

    Raises:
        OptionError: there is no limit, and ft is no better than pre on the task.
    """

    def __init__(
        self,
        field: Field,
        goal: Goal,
        begun: float = 0.0,
        deadline: float = math.inf,
        tell: Callable[[Round | str], None] = lambda _: None,
    ) -> None:
        self.field, self.goal, self.begun, self.deadline, self.tell = field, goal, begun, deadline, tell
        self.tests: list[tuple[str, float]] = []
        self.order: list[str] = []
        self.stopped = False
        self.scale = self._scale()

    def _scale(self) -> tuple[float, float]:
        """Measure what pre lacks of the task, and ft of general ability, on the half that is for choosing.

        Raises:
            OptionError: pre lacks nothing, so that there is no trade-off.
        """
        ends = [
            self.field.standing(cut(model, self.field.halves.choose), self.field.halves.choose)
            for model in (self.field.pre.scores, self.field.ft.scores)
        ]
        lost, forgot = mean_drop(ends[0].lost)[0], mean_drop(ends[1].forgot)[0]
        if self.goal.limit == "knee" and not lost > 0:
            names = ", ".join(measure.name for measure in self.field.tasks)
            raise OptionError(
                f"ft is no better than pre on {names}, so there is no trade-off. Give a limit, or check that the file and the "
                "metric are those of the fine-tuned task."
            )
        return lost, forgot

    def too_few(self) -> str | None:
        """A sentence where there are too few items for the limit."""
        halves = self.field.halves
        ft = self.field.standing(cut(self.field.ft.scores, halves.choose), halves.choose)
        return power_note(self.goal, ft.forgot, min(len(halves.prove[one.name]) for one in self.field.general))

    def race(self) -> list[Course]:
        """The finalists, which have seen all items of the first half, the best first."""
        left = [course for course in self.field.courses.values() if not course.candidate.after]
        waiting = [course for course in self.field.courses.values() if course.candidate.after]
        plan = rounds(len(left), RACE)
        for number, (_, seen) in enumerate(plan, 1):
            last = number == len(plan)
            names = self.field.first(1.0 if last else seen)
            keep = FINALISTS if last else plan[number][0]
            if not last and len(left) <= FINALISTS:
                continue
            done = self.field.see(left, names, number, self._late)
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

    def _late(self) -> bool:
        """Whether what is left of the time is for the proof."""
        return time.monotonic() + FINALISTS / 2 * self.field.seconds > self.deadline

    def _sift(self, left: Sequence[Course], names: Names, number: int, keep: int) -> list[Course]:
        """Those that go on, the best first."""
        standings = {}
        for course in left:
            try:
                standings[course.candidate.label] = self.field.standing_of(course, names)
            except ValueError:
                course.why = "reads the text in other tokens than ft"
        if not standings:
            raise CheckpointError(f"No candidate could be scored: {left[0].why if left else 'see the notes'}.")
        limited = self.field.tasks if self.goal.limit == "retention" else self.field.general
        ahead = math.sqrt(max(len(names[one.name]) / len(self.field.halves.prove[one.name]) for one in limited))
        kept, fallen = sift(standings, self.goal, self.scale, keep, ahead=ahead)
        for place, label in enumerate([*kept, *fallen]):
            self.field.courses[label].rank = place
            self.field.courses[label].why = fallen.get(label, "")
        return [self.field.courses[label] for label in kept]

    def prove(self, finalists: Sequence[Course]) -> Course | None:
        """The winner: the best, by the first half, of the finalists that the second half proves to be within the limit."""
        standings = {
            course.candidate.label: self.field.standing_of(course, self.field.seen(course)) for course in finalists
        }
        merits = {
            label: self.goal.merit(mean_drop(held.lost)[0], mean_drop(held.forgot)[0], self.scale)
            for label, held in standings.items()
        }
        for course in finalists:
            self.field.prove(course)
        passed = list(standings)
        if self.goal.limit != "knee":
            self.order = sorted(standings, key=lambda label: self._safety(standings[label]), reverse=True)
            passed, values = certify(self.order, self._p)
            self.tests = list(zip(self.order, values, strict=False))
        return self.field.courses[max(passed, key=merits.__getitem__)] if passed else None

    def _p(self, label: str) -> float:
        """The p-value of the hypothesis that a finalist is beyond the limit, on the second half."""
        return p_beyond(self._limited(self.field.proved_standing(self.field.courses[label])), self.goal.most)

    def _safety(self, standing: Standing) -> tuple[bool, float]:
        """A key, largest for the safest: within the limit, by most standard errors; beyond it, by the smallest excess."""
        value, error = mean_drop(self._limited(standing))
        room = self.goal.most - value
        return room > 0, room / max(error, 1e-12) if room > 0 else room

    def _limited(self, standing: Standing) -> Sequence[Drop]:
        return standing.lost if self.goal.limit == "retention" else standing.forgot

    def show_others(self) -> None:
        """Score the best of each method that has no finalist on the second half, as far as time and budget go."""
        for course in self._best():
            if time.monotonic() + self.field.seconds / 2 > self.deadline or self.field.spent + 0.5 > BUDGET:
                return
            self.field.prove(course)

    def _best(self) -> list[Course]:
        """The best candidate of each method: the one that got furthest."""
        found: dict[str | None, Course] = {}
        for course in sorted(self.field.courses.values(), key=lambda course: (-course.round, course.rank)):
            if course.round and course.candidate.method is not None:
                found.setdefault(course.candidate.method, course)
        return list(found.values())

    def _tell(self, number: int, of: int, left: Sequence[Course], names: Names) -> None:
        standing = self.field.standing_of(left[0], names)
        left_over = (BUDGET - self.field.spent) * self.field.seconds
        self.tell(
            Round(
                number,
                of,
                len(left),
                len(self.field.courses),
                max(map(len, names.values())),
                left[0].candidate.label,
                1 - mean_drop(standing.lost)[0],
                mean_drop(standing.forgot)[0],
                max(0.0, min(left_over, self.deadline - time.monotonic())),
            )
        )

    def document(self, winner: Course | None, command: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
        """Everything that was found: the comparison on the second half, the race, and the claim."""
        seconds = time.monotonic() - self.begun
        prove = self.field.halves.prove
        pre, ft = replace(self.field.pre, scores=cut(self.field.pre.scores, prove)), self.field.proved[FT]
        rows = [scored for label, scored in self.field.proved.items() if label != FT]
        if winner is not None:
            rows.sort(key=lambda scored: scored.subject.label != winner.candidate.label)
        made = document(
            Plane(pre, ft, self.field.tasks, self.field.general),
            rows,
            kind="auto",
            command=command,
            notes=notes,
            seconds=seconds,
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
                name: {"choose": len(self.field.halves.choose[name]), "prove": len(places)}
                for name, places in prove.items()
            },
            "evaluations": self.field.spent,
            "seconds_of_one": self.field.seconds,
            "candidates": [self._line(course) for course in self.field.courses.values()],
        }
        return made

    def _line(self, course: Course) -> dict[str, Any]:
        """One candidate's line in the document."""
        kept = forgot = None
        if course.seen:
            names = self.field.seen(course)
            try:
                standing = self.field.standing_of(course, names)
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
            return self._stopped()
        if winner is None:
            label, p = self.tests[0]
            standing = self.field.proved_standing(self.field.courses[label])
            return failure(self.goal, label, p, self._limited(standing))
        label = winner.candidate.label
        row = next(row for row in rows if row["label"] == label)
        items = sum(map(len, self.field.halves.prove.values()))
        return success(self.goal, row, items, dict(self.tests).get(label), self.scale)

    def _stopped(self) -> str:
        """How the race stood when it was interrupted."""
        text = "It was stopped before anything was proved, and nothing was written."
        seen = [course for course in self.field.courses.values() if course.round]
        if not seen:
            return text
        line = self._line(min(seen, key=lambda course: (-course.round, course.rank)))
        kept, forgot = share(line["retention"]), share(line["forgetting"], 2)
        return f"{text} Ahead was {line['label']}, which kept {kept} and forgot {forgot} on {line['items']:,} items."
