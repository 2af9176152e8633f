"""The commands around the task vector as a file, and the check of what was written: extract, apply, verify."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from surgery.commands.builder import command
from surgery.commands.shared import PRE, Checks, Json, Machine, Models
from surgery.errors import OptionError
from surgery.methods import METHODS
from surgery.option import build, chosen, declared_options, option, united

# Those that need nothing but the pair.
EXTRACTED = {name: method for name, method in METHODS.items() if not method.calibrated}


@dataclass(frozen=True)
class Choice:
    """The method, and where its task vector goes."""

    method: str = option(help=f"One of {', '.join(EXTRACTED)}.")
    out: Path = option(help="The file to write.")


@dataclass(frozen=True)
class Replace:
    """Whether an output may be replaced."""

    force: bool = option(False, help="Replace an earlier task vector at the output.")


@dataclass(frozen=True)
class Vector:
    """A task vector and its base."""

    pre: str = option(help=PRE)
    delta: Path = option(help="The task vector: a file of surgery extract.")
    out: Path | None = option(None, help="Output folder.", shown="beside the delta, by its name")
    force: bool = option(False, help="Replace an earlier output of surgery, and take any base.")


@dataclass(frozen=True)
class Written:
    """An output of surgery, and the models that it was made from."""

    folder: Path = option(help="A checkpoint that surgery wrote.", argument=True)
    pre: str | None = option(None, help="The pre-trained model that it was made from.")
    ft: str | None = option(None, help="The fine-tuned model, likewise.")


Workers = chosen(Machine, ("workers",))


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    methods = united(list(EXTRACTED.values()))
    command(
        app,
        "extract",
        [Models, Choice, methods, Replace, Json, Checks, Machine],
        _extract,
    )
    command(
        app,
        "apply",
        [Vector, Json, Workers],
        _apply,
    )
    command(
        app,
        "verify",
        [Written, Workers],
        _verify,
    )


def _extract(
    models: Models, choice: Choice, options: Any, replace: Replace, show: Json, checks: Checks, machine: Machine
) -> None:
    """Write the task vector that a method leaves, alone, as one file.

    For each tensor, a bit mask of the entries that are not pre's, and their bits. surgery apply makes the checkpoint of it again.
    """
    from surgery.checkpoint.delta import DELTA
    from surgery.checkpoint.output import check_file
    from surgery.display import progress, say
    from surgery.editing.display import show_report
    from surgery.editing.extract import extract
    from surgery.editing.job import plan
    from surgery.editing.run import check_machine
    from surgery.interrupt import uninterrupted

    if choice.method not in EXTRACTED:
        raise OptionError(f"`method` must be one of {', '.join(EXTRACTED)}, not {choice.method!r}.")
    method = EXTRACTED[choice.method]
    given = {name: value for name, value in vars(options).items() if value not in (None, ())}
    own = {one.name for one in declared_options(method)}
    for name in given:
        if name not in own:
            raise OptionError(f"`{name}` is no option of {choice.method}.")
    check_machine(machine.device, machine.workers)
    job = plan(models.pre, models.ft, build(method, given), strict=checks.strict)
    target = check_file(choice.out, job.inputs, DELTA, force=replace.force)
    start = time.monotonic()
    with progress(job.reading) as advance:
        report, nbytes = extract(
            job,
            target,
            force=replace.force,
            device=machine.device,
            workers=machine.workers,
            allow_nonfinite=checks.allow_nonfinite,
            command=["surgery", *sys.argv[1:]],
            advance=advance,
        )
    seconds = time.monotonic() - start
    with uninterrupted():  # the output is there: Ctrl-C is too late to say that it is not
        show_report(report, target, nbytes=nbytes, seconds=seconds, as_json=show.as_json)
    if not show.as_json:
        say(f"{nbytes / job.nbytes:.1%} of the checkpoint's {job.nbytes:,} bytes")


def _apply(vector: Vector, show: Json, machine: Any) -> None:
    """Put a task vector back on its base: byte for byte the checkpoint that the method would have written.

    A base with another fingerprint is refused.
    """
    from surgery.display import progress
    from surgery.editing import apply
    from surgery.editing.display import show_report
    from surgery.interrupt import uninterrupted

    job = apply.prepare(vector.pre, vector.delta, out=vector.out, force=vector.force)
    start = time.monotonic()
    with progress(job.reading) as advance:
        report = apply.run(job, workers=machine.workers, command=["surgery", *sys.argv[1:]], advance=advance)
    seconds = time.monotonic() - start
    with uninterrupted():  # the output is there: Ctrl-C is too late to say that it is not
        show_report(report, job.out, nbytes=job.nbytes, seconds=seconds, as_json=show.as_json)


def _verify(written: Written, machine: Any) -> None:
    """Check a checkpoint that surgery wrote against its own report.

    Every tensor is read and its checksum compared. With --pre and --ft, every entry of a pruned or reset tensor must be one of
    theirs, and the counts those of the report. Exit code 1 and the first tensor that is wrong, if one is.
    """
    from surgery.display import progress, say
    from surgery.editing import verify

    folder, pre, ft = written.folder, written.pre, written.ft
    if (pre is None) != (ft is None):
        raise OptionError("`pre` and `ft` go together: give both, or neither.")
    checks = verify.prepare(folder, pre, ft)
    with progress(sum(check.reading for check in checks)) as advance:
        verify.run(checks, workers=machine.workers, advance=advance)
    entries = sum(check.tensor.entries for check in checks)
    against = "its report" if pre is None else "its report, pre and ft"
    say(f"{folder}: {len(checks):,} tensors, {entries:,} entries, as {against} would have them.")
