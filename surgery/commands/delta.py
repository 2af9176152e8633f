"""The commands around the task vector as a file, and the check of what was written: extract, apply, verify."""

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from surgery.commands.edit import MAKERS, AllowNonfinite, AsJson, Device, Pre, Strict, Tuned, Workers
from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.methods import Method


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("extract")(_with_method_options(_extract))
    app.command("apply")(_apply)
    app.command("verify")(_verify)


def _extract(
    method: "Method",
    pre: Pre,
    ft: Tuned,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a file at the output.")] = False,
    as_json: AsJson = False,
    allow_nonfinite: AllowNonfinite = False,
    strict: Strict = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Write the task vector that a method leaves, alone, as one file.

    For each tensor, a bit mask of the entries that are not pre's, and their bits. surgery apply makes the checkpoint of it again.
    """
    from surgery import display
    from surgery.checkpoint.output import check_file
    from surgery.editing.display import show_report
    from surgery.editing.extract import extract
    from surgery.editing.job import plan
    from surgery.editing.run import check_machine

    check_machine(device, workers)
    job = plan(pre, ft, method, strict=strict)
    target = check_file(out, job.inputs, force=force)
    start = time.monotonic()
    with display.progress(job.reading) as advance:
        report, nbytes = extract(
            job,
            target,
            force=force,
            device=device,
            workers=workers,
            allow_nonfinite=allow_nonfinite,
            command=["surgery", *sys.argv[1:]],
            advance=advance,
        )
    seconds = time.monotonic() - start
    show_report(report, target, nbytes=nbytes, seconds=seconds, as_json=as_json)
    if not as_json:
        display.say(f"{nbytes / job.nbytes:.1%} of the checkpoint's {job.nbytes:,} bytes")


def _apply(
    pre: Pre,
    delta: Annotated[Path, typer.Option(help="The task vector: a file of surgery extract.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Output folder.", show_default="beside the delta, by its name")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a checkpoint at the output, and take any base."),
    ] = False,
    as_json: AsJson = False,
    workers: Workers = None,
) -> None:
    """Put a task vector back on its base: byte for byte the checkpoint that the method would have written.

    A base with another fingerprint is refused.
    """
    from surgery import display
    from surgery.editing import apply
    from surgery.editing.display import show_report

    job = apply.prepare(pre, delta, out=out, force=force)
    start = time.monotonic()
    with display.progress(job.reading) as advance:
        report = apply.run(job, workers=workers, command=["surgery", *sys.argv[1:]], advance=advance)
    seconds = time.monotonic() - start
    show_report(report, job.out, nbytes=job.nbytes, seconds=seconds, as_json=as_json)


def _verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that surgery wrote.", show_default=False)],
    pre: Annotated[
        str | None, typer.Option(help="The pre-trained model that it was made from.", show_default=False)
    ] = None,
    ft: Annotated[str | None, typer.Option(help="The fine-tuned model, likewise.", show_default=False)] = None,
    workers: Workers = None,
) -> None:
    """Check a checkpoint that surgery wrote against its own report.

    Every tensor is read and its checksum compared. With --pre and --ft, every entry of a pruned or reset tensor must be one of
    theirs, and the counts those of the report. Exit code 1 and the first tensor that is wrong, if one is.
    """
    from surgery import display
    from surgery.editing import verify

    if (pre is None) != (ft is None):
        raise OptionError("--pre and --ft go together: give both, or neither.")
    checks = verify.prepare(folder, pre, ft)
    with display.progress(sum(check.reading for check in checks)) as advance:
        verify.run(checks, workers=workers, advance=advance)
    entries = sum(check.tensor.entries for check in checks)
    against = "its report" if pre is None else "its report, pre and ft"
    display.say(f"{folder}: {len(checks):,} tensors, {entries:,} entries, as {against} would have them.")


def _with_method_options(act: Callable[..., None]) -> Callable[..., None]:
    """A command with --method and the options of every method; those that were not given are the method's own defaults."""
    common = dict(inspect.signature(act).parameters)
    del common["method"]
    own: dict[str, inspect.Parameter] = {}
    for make_method in MAKERS.values():
        for name, parameter in inspect.signature(make_method).parameters.items():
            kind, option = get_args(parameter.annotation)
            own.setdefault(name, parameter.replace(annotation=Annotated[kind | None, option], default=None))

    def command(*, method: str, **values: Any) -> None:
        given = {name: value for name in own if (value := values.pop(name)) is not None}
        if method not in MAKERS:
            raise OptionError(f"--method must be one of {', '.join(MAKERS)}, not {method!r}.")
        for name in given:
            if name not in inspect.signature(MAKERS[method]).parameters:
                raise OptionError(f"--{name.replace('_', '-')} is no option of {method}.")
        act(MAKERS[method](**given), **values)

    choice = Annotated[str, typer.Option(help=f"One of {', '.join(MAKERS)}.", show_default=False)]
    first = inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY, annotation=choice)
    inputs = [common.pop("pre"), common.pop("ft"), first, common.pop("out")]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in [*inputs, *own.values(), *common.values()]
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = act.__doc__
    return command
