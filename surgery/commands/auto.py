"""The command that finds the best model between two checkpoints: auto."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.calibrate.options import Calibration
from surgery.commands.builder import command
from surgery.commands.compare import Others
from surgery.commands.shared import FORCE, Checks, Limits, Pair, Shown, with_norms
from surgery.errors import OptionError, OutputError
from surgery.evaluation.scoring import Scoring
from surgery.methods import METHODS
from surgery.option import chosen, declared_options, flag, option, united, value_of
from surgery.processes import find_process

if TYPE_CHECKING:
    from surgery.comparison.auto import Found
    from surgery.comparison.candidates import Candidate
    from surgery.comparison.folder import Folder
    from surgery.editing.job import Job
    from surgery.methods import Method

OUTPUT, SEARCH = "Output", "Search"
TEXT = ("calibration", "samples", "norms")
UNITS = {"s": 1, "m": 60, "h": 3600, "": 60}


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found:
        raise ValueError(f"takes a time such as 90s, 30m or 2h, not {text!r}.")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Result:
    """Where the winner goes."""

    out: Path | None = option(None, help="Output folder.", shown="beside ft: F-surgery", panel=OUTPUT)
    force: bool = option(False, help=FORCE, panel=OUTPUT)
    dry_run: bool = option(False, help="Show what would be tried, and write nothing.", panel=OUTPUT)


@dataclass(frozen=True)
class Searching:
    """The methods that are tried, and for how long."""

    method: str | None = option(None, help="Only these methods, with commas between.", shown="all", panel=SEARCH)
    time: float | None = option(
        None, help="End in about this time: 90s, 30m, 2h.", parse=_seconds, metavar="TIME", panel=SEARCH
    )
    seed: int = option(0, help="Of the halves into which the items are dealt.", panel=SEARCH)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    texts = united([chosen(Calibration, TEXT, panel=SEARCH)])
    command(app, "auto", [Pair, Others, Limits, Result, Searching, texts, Checks, Shown, Scoring], _auto)


def _auto(
    pair: Pair,
    others: Others,
    limits: Limits,
    result: Result,
    searching: Searching,
    text: Any,
    checks: Checks,
    shown: Shown,
    scoring: Scoring,
) -> None:
    """Find the model that keeps the task and forgets least, prove it on items that nothing was chosen on, and write it.

    All methods race, and every further checkpoint that is named. Without a limit the best trade-off wins; without --general,
    forgetting is measured on text that pre writes. Costs about ten evaluations of one model. Needs pip install
    'model-surgery\\[eval]'.
    """
    from surgery.comparison.auto import auto
    from surgery.comparison.display import race_progress, show
    from surgery.comparison.folder import Folder
    from surgery.comparison.race import wanted
    from surgery.display import say
    from surgery.evaluation.subject import open_subjects

    if find_process() is not None:
        raise OptionError("auto decides by each score what to score next, in one process: start it without torchrun.")
    goal = wanted(limits.max_forgetting, limits.min_retention)
    scoring = scoring if scoring.general else replace(scoring, general=("self",))
    inputs = scoring.inputs(pair.pre, pair.ft, *others.checkpoints)
    job, candidates, notes = _candidates(pair, others, result, searching, text, checks, scoring)
    inputs += job.inputs
    folder = Folder(shown.report, inputs) if shown.report else None
    subjects = open_subjects(pair.pre, pair.ft)
    tasks, general = scoring.measures()
    if result.dry_run:
        from surgery.comparison.display import show_candidates

        show_candidates(goal, candidates, [*tasks, *general], notes, as_json=shown.as_json)
        return
    with race_progress() as (observe, tell), scoring.bench([*tasks, *general], observe) as bench:
        found = auto(
            subjects,
            candidates,
            tasks,
            general,
            bench,
            goal,
            seed=searching.seed,
            seconds=searching.time,
            command=["surgery", *sys.argv[1:]],
            notes=notes,
            tell=tell,
        )
    about = found.document["auto"]
    written = _write(found, job, checks)
    if folder is None and found.winner is not None:
        folder = _default_folder(job, inputs, found)
    show(found.document, folder, as_json=shown.as_json)
    if found.document["stopped"]:
        if not shown.as_json:
            say(about["sentence"])
        raise KeyboardInterrupt
    if found.winner is None:
        raise OptionError(about["sentence"])
    if shown.as_json:
        return
    say(about["sentence"])
    if about["commands"]:
        say("Without the search:", *(f"    {shlex.join(words)}" for words in about["commands"]))
    say(written)


def _candidates(
    pair: Pair, others: Others, result: Result, searching: Searching, text: Any, checks: Checks, scoring: Scoring
) -> tuple[Job, list[Candidate], list[str]]:
    """The planned output, all that is tried, and sentences about what is not.

    Raises:
        SurgeryError: something can be refused before working.
    """
    from surgery.comparison.candidates import averaged, candidates, default_methods, existing, untried
    from surgery.comparison.grid import command_words, named
    from surgery.editing.job import prepare
    from surgery.evaluation.subject import open_subjects

    norms = {name: getattr(text, name) for name in TEXT if getattr(text, name) is not None}
    calibrating = "calibration" in norms or "norms" in norms
    names = None if searching.method is None else [named(name.strip()).name for name in searching.method.split(",")]
    unready = [name for name in names or () if METHODS[name].calibrated and not calibrating]
    if unready:
        raise OptionError(f"{unready[0]} needs a text, `calibration`, or norms that were kept, `norms`.")
    methods = default_methods(names, calibrated=calibrating)
    job = prepare(
        pair.pre, pair.ft, methods[0], out=result.out, force=result.force, strict=checks.strict, label="surgery"
    )
    more = ["--allow-nonfinite"] if checks.allow_nonfinite else []
    words = [word for name, value in norms.items() for word in (flag(name), str(value))]

    def line(method: Method) -> Sequence[str]:
        return command_words(method, pair.pre, pair.ft, [*(words if method.calibrated else []), *more])

    ready = {}
    for place, method in enumerate(methods):
        if method.calibrated and not result.dry_run:
            if method.name not in ready:
                ready[method.name] = with_norms(job, method, norms, scoring.device)
            normed: Any = ready[method.name].method
            methods[place] = replace(
                normed, **{one.name: value_of(method, one.name) for one in declared_options(type(method))}
            )
    found, notes = candidates(job, methods, line, calibrated=ready, allow_nonfinite=checks.allow_nonfinite)
    if names is None:
        found += averaged(job, line, out=job.out, allow_nonfinite=checks.allow_nonfinite)
        notes += untried(calibrated=calibrating)
    _, *there = open_subjects(pair.pre, pair.ft, others.checkpoints)
    return job, [*map(existing, there), *found], [*job.pair.notes, *notes]


def _write(found: Found, job: Job, checks: Checks) -> str:
    """Write the winner, with its proof in its model card; returns a sentence about it."""
    from surgery.display import progress
    from surgery.editing.run import run

    winner = found.winner
    if winner is None:
        return ""
    if winner.job is None:
        path = winner.subject().checkpoint.source.typed
        return f"It is {path} itself, so nothing was written."
    planned = winner.job()
    planned.pair.notes.append(found.document["auto"]["sentence"])
    planned = replace(planned, out=job.out, replace=job.replace, container=job.container)
    with progress(planned.reading) as advance:
        run(
            planned,
            allow_nonfinite=checks.allow_nonfinite,
            command=found.document["command"],
            advance=advance,
        )
    return f"Wrote {job.out}"


def _default_folder(job: Job, inputs: Sequence[Path], found: Found) -> Folder | None:
    """The folder of the page beside the output; a note where there cannot be one, since the output is there already."""
    from surgery.comparison.folder import Folder

    try:
        return Folder(job.out.with_name(f"{job.out.name}-report"), inputs)
    except (OutputError, OptionError) as error:
        found.document["notes"].append(f"There is no page: {error}")
        return None
