"""Methods at many settings on one table (`surgery sweep`): each is edited in memory, tensor by tensor, and scored.

What is scored is byte for byte the checkpoint that the method's own command would write. No checkpoint is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.comparison.auto import auto
from surgery.comparison.candidates import Candidate, place
from surgery.comparison.compare import STOPPED, Plane, document
from surgery.comparison.grid import interleaved, label, line
from surgery.comparison.race import Goal
from surgery.editing.job import Job, replan
from surgery.errors import OptionError
from surgery.evaluation.bench import Observe, Scored
from surgery.evaluation.subject import Subject, edited_subject
from surgery.methods.method import main_option

if TYPE_CHECKING:
    from surgery.evaluation.scores import Measure
    from surgery.evaluation.scoring import Scoring
    from surgery.methods import Method


@dataclass(frozen=True)
class Edits:
    """The pair and what may be done to it.

    Attributes:
        subjects: pre and ft.
        jobs: a planned edit for each method's name, whose setting is changed.
        commands: the command line that writes the checkpoint of a setting.
        device, allow_nonfinite: of the edit, as for `surgery.editing.run.run`.
    """

    subjects: Sequence[Subject]
    jobs: Mapping[str, Job]
    commands: Callable[[Method], list[str]]
    device: str = "auto"
    allow_nonfinite: bool = False

    def job(self, method: Method) -> Job:
        """The edit at a setting.

        Raises:
            OptionError: the setting does not fit the model.
        """
        return replan(self.jobs[method.name], method)

    def subject(self, method: Method) -> Subject:
        """The model that a setting makes, as a row.

        Raises:
            OptionError: the setting does not fit the model.
        """
        edited = edited_subject(
            self.job(method), label=label(method), device=self.device, allow_nonfinite=self.allow_nonfinite
        )
        return replace(edited, command=self.commands(method))

    def check(self, methods: Iterable[Method]) -> None:
        """Refuse, before any work, settings that do not fit the model.

        Raises:
            OptionError: one does not.
        """
        # What can be wrong depends on the method and on how many parts it cuts the model into.
        kinds = {(method.name, _parts(method)): method for method in methods}
        for method in kinds.values():
            self.job(method)


def _parts(method: Method) -> int:
    """How many numbers the main option of a setting has."""
    value = getattr(method, main_option(type(method)).name)
    return len(value) if isinstance(value, tuple) else 1


@dataclass(frozen=True)
class Known:
    """Scores that are known already, asked for as those of a bench are.

    Attributes:
        scored: by label.
    """

    scored: Mapping[str, Scored]

    def subject(self, label: str) -> Subject:
        """The model with that label."""
        return self.scored[label].subject

    def fingerprint(self, subject: Subject) -> str:
        """The fingerprint of a model's weights."""
        return self.scored[subject.label].fingerprint

    def score(self, subject: Subject, only: Mapping[str, Sequence[int]] | None = None) -> Scored:
        """The scores of a model, all of them or those of some items."""
        found = self.scored[subject.label]
        if only is None:
            return found
        return replace(found, scores={name: found.scores[name].at(places) for name, places in only.items()})


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Attributes:
        document: what results.json holds: of the settings that were done, with "stopped" after Ctrl-C and the "choice".
        best: the chosen setting; None where none was asked for, none meets the limit, or Ctrl-C came first.
    """

    document: dict[str, Any]
    best: Method | None = None


def sweep(
    edits: Edits,
    groups: Sequence[Sequence[Method]],
    tasks: Sequence[Measure],
    general: Sequence[Measure],
    scoring: Scoring,
    *,
    goal: Goal | None = None,
    command: Sequence[str] = (),
    observe: Observe = lambda *_: None,
) -> Swept:
    """Score settings.

    Args:
        groups: the settings of each method, along its main number; rows come in this order, whatever order they are tried in.
        tasks, general: as `scoring` makes them.
        goal: what the chosen setting has to be; none is chosen without one. It is chosen on one half of the items and proved on
            the other, see `surgery.comparison.auto`.
        command: what the user typed.
        observe: told of the progress.

    Raises:
        SurgeryError: a setting cannot be edited or scored.
        KeyboardInterrupt: Ctrl-C before pre and ft were done.
    """
    begun, stopped = time.monotonic(), False
    methods = [method for group in groups for method in group]
    if not methods:
        raise OptionError("There is no setting to try.")
    edits.check(methods)
    scored: dict[str, Scored] = {}
    with scoring.bench([*tasks, *general], observe) as bench:
        pre, ft = map(bench.score, edits.subjects)
        try:
            for method in interleaved(groups):
                scored[label(method)] = bench.score(edits.subject(method))
        except KeyboardInterrupt:
            stopped = True
    rows = [scored[label(method)] for method in methods if label(method) in scored]
    notes = list(dict.fromkeys(note for job in edits.jobs.values() for note in job.pair.notes))
    notes += [STOPPED] if stopped else []
    best, choice = None, None
    if goal is not None and not stopped:
        by_label = {label(method): method for method in methods}
        known = Known({"pre": pre, "ft": ft, **scored})
        candidates = [
            Candidate(name, method.name, partial(known.subject, name), line=line(method), place=place(method))
            for name, method in by_label.items()
        ]
        found = auto(edits.subjects, candidates, tasks, general, known, goal)
        choice = found.document["auto"]
        best = None if found.winner is None else by_label[found.winner.label]
        choice["commands"] = [] if best is None else [edits.commands(best)]
        notes += [choice["sentence"]] if best else []
    made = document(
        Plane(pre, ft, tasks, general),
        rows,
        kind="sweep",
        command=command,
        notes=notes,
        seconds=time.monotonic() - begun,
    )
    return Swept(made | {"stopped": stopped, "choice": choice}, best)
