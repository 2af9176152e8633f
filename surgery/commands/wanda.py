"""The command that calibrates before it edits: wanda."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.auto import auto_sparsity
from surgery.commands.edit import Exclude, Include, Rest, ScopeName, Sparsity, make_scope

if TYPE_CHECKING:
    from surgery.editing.job import Job
    from surgery.methods import Method


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("wanda")(auto_sparsity(_wanda, _complete))


def _wanda(
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to run the fine-tuned model on: a .txt, .jsonl, .json or .parquet file, or a data set on the hub.",
            show_default=False,
        ),
    ] = None,
    sparsity: Sparsity = 0.9,
    samples: Annotated[int, typer.Option(help="How many stretches of text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in each; at most what the model takes.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the places in the text.")] = 0,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field of a record that holds the text.", show_default="text, or messages as a chat"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples that go through a layer together.")] = 1,
    save_norms: Annotated[
        Path | None, typer.Option(help="Keep the norms in this .safetensors file.", show_default=False)
    ] = None,
    norms: Annotated[
        Path | None, typer.Option(help="Norms that were kept, in place of a calibration.", show_default=False)
    ] = None,
    group: Annotated[
        str,
        typer.Option(help="What has a threshold of its own: [b]row[/b] (the output row of a weight) or [b]tensor[/b]."),
    ] = "row",
    scope: ScopeName = "all",
    rest: Rest = "ft",
    include: Include = None,
    exclude: Exclude = None,
) -> "Method":
    """Prune the task vector by Wanda's score: how far a weight moved, times how large its input is.

    S = |Δ| · ‖X‖, where ‖X‖ is the norm of the input feature over all tokens when the fine-tuned model runs on calibration text,
    one layer in memory at a time. Needs transformers: pip install 'model-surgery\\[wanda]'.
    """
    from surgery.methods.wanda import Wanda

    return Wanda(sparsity, make_scope(scope, rest, include, exclude), group)


def _complete(job: "Job", device: str, dry_run: bool, **own: Any) -> "Job":
    """Measure the norms and plan again; a dry run only says how much memory that would take."""
    from surgery import display
    from surgery.calibrate.run import Calibration, activations, calibrated
    from surgery.text import size

    calibration = Calibration(
        own["calibration"],
        own["norms"],
        own["save_norms"],
        own["samples"],
        own["seq_len"],
        own["seed"],
        own["text_field"],
        own["batch_size"],
    )
    if dry_run:
        nbytes = activations(job, calibration)
        job.pair.notes.append(f"Calibration keeps at most {size(nbytes)} of activations beside one layer.")
        return job
    with display.calibrating() as advance:
        return calibrated(job, calibration, device=device, advance=advance)
