"""Methods at many settings on one table (`surgery sweep`): each is edited in memory, tensor by tensor, and scored.

What is scored is byte for byte the checkpoint that the method's own command would write. No checkpoint is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.comparison.choose import Choice, Limit, choose
from surgery.comparison.compare import STOPPED, Outcome, Plane, document
from surgery.comparison.grid import interleaved, label, main_option, on_a_line
from surgery.editing.job import Job, replan
from surgery.errors import OptionError
from surgery.evaluation.bench import Bench, Observe, Scored
from surgery.evaluation.subject import Subject, edited_subject
from surgery.text import fixed

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


class Bout:
    """Settings that are scored, each once, against pre and ft.

    Attributes:
        scored: by label, in the order in which they were scored.

    Raises:
        SurgeryError: pre or ft cannot be scored.
    """

    def __init__(self, edits: Edits, bench: Bench, tasks: Sequence[Measure], general: Sequence[Measure]) -> None:
        self.edits, self.bench = edits, bench
        pre, ft = map(bench.score, edits.subjects)
        self.plane = Plane(pre, ft, tasks, general)
        self.scored: dict[str, Scored] = {}

    def outcome(self, method: Method) -> Outcome:
        """Where a setting stands.

        Raises:
            SurgeryError: it cannot be edited or scored.
        """
        name = label(method)
        if name not in self.scored:
            edits = self.edits
            subject = edited_subject(
                edits.job(method), label=name, device=edits.device, allow_nonfinite=edits.allow_nonfinite
            )
            self.scored[name] = self.bench.score(replace(subject, command=edits.commands(method)))
        return self.plane.outcome(self.scored[name])


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

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
    limit: Limit | None = None,
    most: int | None = None,
    command: Sequence[str] = (),
    observe: Observe = lambda *_: None,
) -> Swept:
    """Score settings, all of them or those that a choice takes.

    Args:
        groups: the settings of each method, along its main number; rows come in this order, whatever order they are tried in.
        tasks, general: as `scoring` makes them.
        limit: what the chosen setting has to meet; none is chosen without one.
        most: see `surgery.comparison.choose.choose`.
        command: what the user typed.
        observe: told of the progress.

    Raises:
        SurgeryError: a setting cannot be edited or scored.
        KeyboardInterrupt: Ctrl-C before pre and ft were done.
    """
    begun, stopped, choice = time.monotonic(), False, None
    order = interleaved(groups)
    methods = [method for group in groups for method in group]
    if not methods:
        raise OptionError("There is no setting to try.")
    edits.check(methods)
    with scoring.bench([*tasks, *general], observe) as bench:
        bout = Bout(edits, bench, tasks, general)
        try:
            if limit is None:
                for method in order:
                    bout.outcome(method)
            else:
                line = on_a_line(methods)
                tried = methods if line else order
                choice = choose(len(tried), lambda place: bout.outcome(tried[place]), limit, line=line, most=most)
        except KeyboardInterrupt:
            stopped = True
    rows = [bout.scored[label(method)] for method in methods if label(method) in bout.scored]
    notes = list(dict.fromkeys(note for job in edits.jobs.values() for note in job.pair.notes))
    if stopped:
        notes.append(STOPPED)
    best, about = None, None
    if limit is not None and choice is not None:
        best = None if choice.best is None else tried[choice.best]
        sentence = _sentence(limit, choice, tried)
        notes += [sentence] if best else []
        about = {
            "limit": str(limit),
            "label": None if best is None else label(best),
            "tried": len(choice.tried),
            "of": len(tried),
            "bisected": choice.bisected,
            "command": None if best is None else edits.commands(best),
            "sentence": sentence,
        }
    made = document(bout.plane, rows, kind="sweep", command=command, notes=notes, seconds=time.monotonic() - begun)
    made |= {"stopped": stopped, "choice": about}
    return Swept(made, best)


def _sentence(limit: Limit, choice: Choice, methods: Sequence[Method]) -> str:
    """The choice for people, and how sure it is."""
    how = f"{len(choice.tried)} of {len(methods)} settings were scored"
    how += ", by bisection" if choice.bisected else ""
    place = choice.nearest if choice.best is None else choice.best
    outcome = choice.tried[place]
    value = getattr(outcome, limit.score)
    name, score = label(methods[place]), fixed(value)
    if choice.best is None:
        return (
            f"No setting meets {limit} ({how}); the nearest is {name} with a {limit.score} of {score}: allow more, or try other "
            "settings."
        )
    other = getattr(outcome, limit.other)
    rest = fixed(other)
    return (
        f"{name} meets {limit} with the best {limit.other}: {limit.score} {score}, {limit.other} {rest} ({how}); "
        f"{limit.sure(outcome)}."
    )
