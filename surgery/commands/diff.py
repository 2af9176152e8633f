"""The command that measures a pair and writes nothing to it: diff."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from surgery.checkpoint.pair import Pair


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("diff")(_diff)


def _diff(
    pre: Annotated[
        str,
        typer.Option(
            help="The pre-trained model: a folder, a file, or a hub id with an optional @revision.", show_default=False
        ),
    ],
    ft: Annotated[
        str,
        typer.Option(
            help="The fine-tuned model or LoRA adapter, likewise, or what surgery made of one.", show_default=False
        ),
    ],
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Look at this tensor alone.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw to FILE.png, .svg or .pdf: the heat map of layers and modules, or with --tensor the four panels |W|, |Δ|, "
            "|Δ| / |W| and FAPM's score. Needs matplotlib.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one line for each tensor to FILE.csv.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each tensor too.")] = False,
    workers: Annotated[int | None, typer.Option(help="Threads.", show_default="one for each core, at most 8")] = None,
) -> None:
    """Show where fine-tuning went: what is unchanged, and how far the rest moved, by category and by layer.

    ‖Δ‖/‖W‖ is of all entries together, D its mean over tensors. Quantiles are within 1/256 of themselves; of a tensor of 2^18
    entries or more they are a sample's (at least 2^17 entries, drawn all over it). A ratio |Δ|/|W| with W = 0 and Δ ≠ 0 is
    counted under ∞ and in no quantile.
    """
    from contextlib import ExitStack

    from surgery.diff.display import show_diff, show_tensor
    from surgery.diff.measure import as_csv, comparable, measure, prepare, select
    from surgery.display import progress
    from surgery.engines.stream import workers as count_workers
    from surgery.paths import OutFile

    count_workers(workers)
    if plot:
        from surgery.pictures import ENDINGS, check_matplotlib

        check_matplotlib()
    with ExitStack() as places:
        table = places.enter_context(OutFile(csv, (".csv",), "--csv")) if csv else None
        picture = places.enter_context(OutFile(plot, ENDINGS, "--plot")) if plot else None
        both = prepare(pre, ft)
        tensors = [select(both, tensor)] if tensor else comparable(both)
        with progress(sum(each.nbytes for each in tensors)) as advance:
            document = measure(both, tensors, workers=workers, advance=advance)
        written = []
        if table:
            table.write(as_csv(document))
            written.append(f"Wrote {table.path}")
        if picture:
            picture.write(_draw(both, document, tensor, picture.path.suffix.lower()[1:]))
            written.append(f"Wrote {picture.path}")
    show = show_tensor if tensor else show_diff
    show(document, written, as_json=as_json)


def _draw(both: "Pair", document: dict[str, Any], tensor: str | None, kind: str) -> bytes:
    from surgery.diff.plot import four_panels, heat_map
    from surgery.pictures import render

    if tensor is None:
        return render(heat_map(document), kind)
    from surgery.diff.measure import select
    from surgery.diff.panels import reduce

    return render(four_panels(reduce(select(both, tensor)), tensor), kind)
