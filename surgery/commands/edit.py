"""The commands that write an edited checkpoint: fapm, magnitude, half-reset, hma, ties, dare."""

import inspect
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.editing.job import Job
    from surgery.methods import Method
    from surgery.methods.scope import Scope

Sparsity = Annotated[float, typer.Option(help="Share of each tensor's entries that goes back to pre, from 0 to 1.")]
ScopeName = Annotated[
    str,
    typer.Option(
        "--scope",
        help="Tensors to prune: [b]all[/b] (attention, feed-forward, embedding, head) or [b]linear[/b] (attention, "
        "feed-forward). Routers, norms and biases are in neither.",
    ),
]
Rest = Annotated[str, typer.Option(help="What becomes of tensors out of scope: [b]ft[/b] or [b]pre[/b].")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Prune only tensors whose name this regular expression matches somewhere. Repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out tensors whose name this regular expression matches. Repeatable.")
]
Group = Annotated[
    str,
    typer.Option(
        help="What has a threshold of its own: [b]tensor[/b], or [b]expert[/b], each one of a stacked [E, …] tensor."
    ),
]
Lam = Annotated[float, typer.Option(help="λ, the factor of the merged task vector.")]
# A list everywhere, since a single option given twice would silently be the last.
Tuned = Annotated[
    list[str],
    typer.Option(
        help="The fine-tuned model or LoRA adapter, likewise. Repeatable for ties and dare: what is not merged is the first's.",
        show_default=False,
    ),
]
Pre = Annotated[
    str,
    typer.Option(
        help="The pre-trained model: a folder, a file, or a hub id with an optional @revision.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf of edited tensors pass.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse tensors or vocabulary rows that only one side has.")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N. [b]auto[/b] is the processor: it keeps up with its disk, so a GPU waits too."
    ),
]
Workers = Annotated[int | None, typer.Option(help="Threads.", show_default="one for each core, at most 8")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    from surgery.commands.auto import auto_sparsity, optimizing

    searching: dict[str, Any] = {"fapm": auto_sparsity, "magnitude": auto_sparsity, "hma": optimizing}
    for name, make_method in MAKERS.items():
        app.command(name)(searching.get(name, edit_command)(make_method))


def _fapm(
    sparsity: Sparsity = 0.9,
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
    group: Group = "tensor",
) -> "Method":
    """Prune the task vector by FAPM's score: how far a weight moved, less how far it moved for its size.

    S = |Δ| − mean(|W_pre|) · |Δ| / |W_pre|, the lowest go back to pre. An entry with Δ = 0 scores 0; one with W_pre = 0 and
    Δ ≠ 0 goes first. Per tensor, round(sparsity · n) entries go, and with them those tied with the last.
    """
    from surgery.methods.fapm import Fapm

    return Fapm(sparsity, make_scope(scope, rest, include, exclude), group)


def _magnitude(
    sparsity: Sparsity = 0.9,
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
    group: Group = "tensor",
) -> "Method":
    """Prune the task vector by magnitude: the weights that moved least go back to pre.

    S = |Δ|. Per tensor, round(sparsity · n) entries go, and with them those tied with the last.
    """
    from surgery.methods.magnitude import Magnitude

    return Magnitude(sparsity, make_scope(scope, rest, include, exclude), group)


def _half_reset(
    ratio: Annotated[float, typer.Option(help="Share of the block tensors that is reset, from 0 to 1.")] = 0.5,
    level: Annotated[
        str,
        typer.Option(
            help="[b]category[/b]: a half of each layer's attention, feed-forward and norm tensors. [b]layer[/b]: every other "
            "layer. [b]model[/b]: a half of all block matrices."
        ),
    ] = "category",
    seed: Annotated[int, typer.Option(help="Which half. The same seed gives the same tensors on any machine.")] = 0,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Reset a group outside the blocks too: embedding, head or norm (the final one). Repeatable."),
    ] = None,
) -> "Method":
    """Reset a random half of the block tensors to pre, as a whole.

    A bias goes with its weight. Embedding, head, final norm and routers stay ft.
    """
    from surgery.methods.half_reset import HalfReset

    return HalfReset(ratio, level, seed, tuple(also or ()))


def _hma(
    ratios: Annotated[
        str,
        typer.Option(
            help="Weight of pre in each part of the model, from input to output: 0.3,0.2,0.1. One number averages all."
        ),
    ] = "0.5",
) -> "Method":
    """Average pre and ft, with a weight of its own for each part of the depth.

    out = α · pre + (1 − α) · ft. Embeddings belong to the first part, final norm and head to the last.
    """
    from surgery.methods.hma import Hma

    try:
        numbers = tuple(float(word) for word in ratios.split(","))
    except ValueError:
        raise OptionError(
            f"--ratios takes numbers with commas between them, such as 0.3,0.2,0.1, not {ratios!r}."
        ) from None
    return Hma(numbers)


def _ties(
    sparsity: Annotated[
        float,
        typer.Option(help="Share of each task vector's entries that is trimmed, from 0 to 1: those that moved least."),
    ] = 0.8,
    lam: Lam = 1.0,
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
) -> "Method":
    """Merge task vectors by TIES: trim each, elect a sign for every entry, average those that agree.

    out = pre + λ · mean of the trimmed ft − pre that have the sign of their sum. Per tensor and --ft, round(sparsity · n) entries
    are trimmed, and with them those tied with the last. With one --ft and λ = 1 this is magnitude pruning.
    """
    from surgery.methods.ties import Ties

    return Ties(sparsity, lam, make_scope(scope, rest, include, exclude))


def _dare(
    drop_rate: Annotated[
        float, typer.Option(help="p: each entry of a task vector is dropped with this probability, from 0 to 1.")
    ] = 0.9,
    lam: Lam = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw. The same seed drops the same entries on any machine.")] = 0,
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
) -> "Method":
    """Drop a random share of each task vector, rescale the rest by 1 / (1 − p), and add them to pre.

    out = pre + λ · Σ τ̂, over the --ft given.
    """
    from surgery.methods.dare import Dare

    return Dare(drop_rate, lam, seed, make_scope(scope, rest, include, exclude))


def make_scope(scope: str, rest: str, include: list[str] | None, exclude: list[str] | None) -> "Scope":
    """The scope that the options of a pruning method say."""
    from surgery.methods.scope import Scope

    return Scope(scope, rest, tuple(include or ()), tuple(exclude or ()))


def _edit(
    method: "Method",
    complete: "Callable[..., Job] | None",
    label: str | None,
    pre: Pre,
    ft: Tuned,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.", show_default="beside ft, named after the method")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at the output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    as_json: AsJson = False,
    allow_nonfinite: AllowNonfinite = False,
    strict: Strict = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of the output.", show_default="as ft is cut, else 5GB")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    from surgery import display
    from surgery.editing.display import show_plan, show_report
    from surgery.editing.job import prepare
    from surgery.editing.run import check_machine, run

    check_machine(device, workers)
    job = prepare(pre, ft, method, out=out, force=force, strict=strict, max_shard_size=max_shard_size, label=label)
    if complete is not None:
        job = complete(job, device, dry_run, allow_nonfinite=allow_nonfinite)
    if dry_run:
        show_plan(job, as_json=as_json)
        return
    start = time.monotonic()
    with display.progress(job.reading) as advance:
        report = run(
            job,
            device=device,
            workers=workers,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            command=["surgery", *sys.argv[1:]],
            advance=advance,
        )
    seconds = time.monotonic() - start
    show_report(report, job.out, nbytes=job.nbytes, seconds=seconds, as_json=as_json)


def edit_command(
    make_method: "Callable[..., Method]",
    complete: "Callable[..., Job] | None" = None,
    label: "Callable[..., str | None]" = lambda **_: None,
) -> Callable[..., None]:
    """A command whose options are a method's own and, around them, those of every edit.

    Args:
        make_method: makes the method from its own options.
        complete: takes the checked job, the device, whether it is a dry run, allow_nonfinite, and those options; returns the job
            to run.
        label: takes those options; see `surgery.editing.job.prepare`.
    """
    own = inspect.signature(make_method).parameters
    common = dict(inspect.signature(_edit).parameters)
    del common["method"], common["complete"], common["label"]

    def command(**values: Any) -> None:
        options = {name: values.pop(name) for name in own}
        completing = partial(complete, **options) if complete else None
        _edit(make_method(**options), completing, label(**options), **values)

    inputs = [common.pop("pre"), common.pop("ft")]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in [*inputs, *own.values(), *common.values()]
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = make_method.__doc__
    return command


# What makes each method from its own options.
MAKERS: dict[str, "Callable[..., Method]"] = {
    "fapm": _fapm,
    "magnitude": _magnitude,
    "half-reset": _half_reset,
    "hma": _hma,
    "ties": _ties,
    "dare": _dare,
}
