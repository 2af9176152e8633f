"""The commands that write an edited checkpoint, one for each method of the registry."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.calibrate.options import Calibration
from surgery.commands import search
from surgery.commands.builder import command
from surgery.commands.shared import FORCE, Checks, Json, Machine, Models
from surgery.errors import OptionError
from surgery.methods import METHODS, Method
from surgery.option import build, flat, option

if TYPE_CHECKING:
    from surgery.editing.job import Job


# A range of sparsities that is worth a word in a plan.
NOTEWORTHY = 0.02


@dataclass(frozen=True)
class Output:
    """Where an edit goes, and how."""

    out: Path | None = option(None, help="Output folder.", shown="beside ft, named after the method")
    force: bool = option(False, help=FORCE)
    resume: bool = option(False, help="Continue a run that was killed.")
    dry_run: bool = option(False, help="Show what would be done, and write nothing.")
    part: str | None = option(
        None,
        help="The share of this process: the files of one of so many parts, such as 3/16; torchrun says it by itself. The output "
        "appears with the last part.",
        metavar="N/OF",
    )
    max_shard_size: str | None = option(None, help="Largest file of the output.", shown="as ft is cut, else 5GB")


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for method in METHODS.values():
        calibration = [Calibration] if method.calibrated else []
        parts = [Models, *calibration, flat(method, search.words(method)), *search.parts(method)]
        command(app, method.name, [*parts, Output, Json, Checks, Machine], partial(_edit, method), help=method.help)


def _edit(kind: type[Method], models: Models, *parts: Any) -> None:
    """Edit a pair by a method, after its calibration and its search where there are such.

    Args:
        parts: the others that `register` gives the command, in this order.
    """
    from surgery.checkpoint.part import find_part
    from surgery.display import progress
    from surgery.editing.display import show_outstanding, show_plan, show_report
    from surgery.editing.job import prepare
    from surgery.editing.run import Outstanding, check_machine, run_part, taken
    from surgery.interrupt import uninterrupted

    *before, output, show, checks, machine = parts
    calibration = next((part for part in before if isinstance(part, Calibration)), None)
    values = {name: value for part in before if part is not calibration for name, value in vars(part).items()}
    label = search.asked(kind, values)
    part = find_part(output.part)
    if label and part:
        raise OptionError("`part` does not go with a search: find the setting first, and give it.")
    method = build(kind, values)
    check_machine(machine.device, machine.workers)
    job = prepare(
        models.pre,
        models.ft,
        method,
        out=output.out,
        force=output.force,
        strict=checks.strict,
        max_shard_size=output.max_shard_size,
        label=label,
    )
    scored = search.measures(values, machine.device, job) if label and not output.dry_run else None
    if calibration is not None:
        job = _calibrated(job, calibration, machine.device, dry_run=output.dry_run)
    if scored is not None:
        job = search.found(job, values, machine.device, checks.allow_nonfinite, scored)
    elif label:
        search.planned(job, values)
    if output.dry_run:
        job.pair.notes.extend(_same(job))
        show_plan(job, device=taken(machine.device), as_json=show.as_json)
        return
    start = time.monotonic()
    with progress(job.reading) as advance:
        report = run_part(
            job,
            part,
            device=machine.device,
            workers=machine.workers,
            resume=output.resume,
            allow_nonfinite=checks.allow_nonfinite,
            command=["surgery", *sys.argv[1:]],
            advance=advance,
        )
    seconds = time.monotonic() - start
    with uninterrupted():  # the output is there: Ctrl-C is too late to say that it is not
        if isinstance(report, Outstanding):
            assert part
            show_outstanding(part, report, job.out, as_json=show.as_json)
            return
        show_report(report, job.out, nbytes=job.nbytes, seconds=seconds, as_json=show.as_json)


def _same(job: Job) -> list[str]:
    """A note on the sparsities that make no difference, if there are such."""
    from surgery.diff.plateau import planned
    from surgery.text import fixed

    found = planned(job.steps)
    if found is None or found.stop - found.start < NOTEWORTHY:
        return []
    start, stop = fixed(found.start, 2), fixed(found.stop, 2)
    return [f"Every --sparsity from {start} to {stop} does about the same, since so many entries did not move."]


def _calibrated(job: Job, calibration: Calibration, device: str, *, dry_run: bool) -> Job:
    """Measure the norms and plan again; a dry run only says how much memory that would take."""
    from surgery.calibrate.run import activations, calibrated
    from surgery.display import calibrating
    from surgery.text import size

    if dry_run:
        nbytes = activations(job, calibration)
        job.pair.notes.append(f"Calibration keeps at most {size(nbytes)} of activations beside one layer.")
        return job
    with calibrating() as advance:
        return calibrated(job, calibration, device=device, advance=advance)
