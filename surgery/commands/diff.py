"""The command that measures a pair and writes nothing to it: diff."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from surgery.commands.builder import command
from surgery.commands.shared import FT, PRE
from surgery.option import option

if TYPE_CHECKING:
    from surgery.checkpoint.pair import Pair


@dataclass(frozen=True)
class Asked:
    """Options of `diff`: what is measured, and where it goes."""

    pre: str = option(help=PRE)
    ft: str = option(help=f"{FT[:-1]}, or what surgery made of one.")
    tensor: str | None = option(None, metavar="NAME", help="Look at this tensor alone.")
    ranks: bool = option(
        False,
        help="The spectrum of Δ instead, of each matrix: stable rank, the share of ‖Δ‖² in the leading singular values, and "
        "intruders, the leading directions of ft that pre does not have. --plot draws the spectra. Takes memory as "
        "[b]surgery intruder[/b] does.",
    )
    plot: Path | None = option(
        None,
        metavar="FILE",
        help="Draw to FILE.png, .svg or .pdf: the heat map of layers and modules, or with --tensor the four panels |W|, |Δ|, "
        "|Δ| / |W| and FAPM's score. Needs matplotlib.",
    )
    csv: Path | None = option(None, metavar="FILE", help="Write one line for each tensor to FILE.csv.")
    as_json: bool = option(False, flag="--json", help="Print everything as JSON, each tensor too.")
    workers: int | None = option(None, help="Threads.", shown="one for each core, at most 8")


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(
        app,
        "diff",
        [Asked],
        _diff,
    )


def _diff(asked: Asked) -> None:
    """Show where fine-tuning went: what is unchanged, and how far the rest moved, by category and by layer.

    ‖Δ‖/‖W‖ is of all entries together, D its mean over tensors. Quantiles are within 1/256 of themselves; of a tensor of 2^18
    entries or more they are a sample's (at least 2^17 entries, drawn all over it). A ratio |Δ|/|W| with W = 0 and Δ ≠ 0 is
    counted under ∞ and in no quantile.
    """
    from contextlib import ExitStack

    from surgery.diff import measure as numbers
    from surgery.diff import ranks
    from surgery.diff.display import show_diff, show_ranks, show_tensor
    from surgery.diff.measure import comparable, prepare, select
    from surgery.display import progress
    from surgery.engines.stream import workers as count_workers
    from surgery.paths import OutFile, local

    count_workers(asked.workers)
    if asked.plot:
        from surgery.pictures import PICTURE, check_matplotlib

        check_matplotlib()
    inputs = local(asked.pre, asked.ft)
    kind = ranks if asked.ranks else numbers
    with ExitStack() as places:
        table = places.enter_context(OutFile(asked.csv, kind.TABLE, "csv", inputs)) if asked.csv else None
        picture = places.enter_context(OutFile(asked.plot, PICTURE, "plot", inputs)) if asked.plot else None
        both = prepare(asked.pre, asked.ft)
        for place in (table, picture):
            if place:
                place.keep_off([*both.pre.files.values(), *both.ft.files.values()])
        tensors = [select(both, asked.tensor)] if asked.tensor else comparable(both)
        tensors = ranks.matrices(tensors) if asked.ranks else tensors
        with progress(sum(each.nbytes for each in tensors) * (ranks.PASSES if asked.ranks else 1)) as advance:
            document = kind.measure(both, tensors, workers=asked.workers, advance=advance)
        written = []
        if table:
            table.write(kind.as_csv(document))
            written.append(f"Wrote {table.path}")
        if picture:
            picture.write(_draw(both, document, asked, picture.path.suffix.lower()[1:]))
            written.append(f"Wrote {picture.path}")
    show = show_ranks if asked.ranks else show_tensor if asked.tensor else show_diff
    show(document, written, as_json=asked.as_json)


def _draw(both: Pair, document: dict[str, Any], asked: Asked, kind: str) -> bytes:
    from surgery.diff.plot import four_panels, heat_map, spectra
    from surgery.pictures import render

    if asked.ranks:
        return render(spectra(document), kind)
    if (tensor := asked.tensor) is None:
        return render(heat_map(document), kind)
    from surgery.diff.measure import select
    from surgery.diff.panels import reduce

    return render(four_panels(reduce(select(both, tensor)), tensor), kind)
