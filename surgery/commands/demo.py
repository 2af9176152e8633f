"""The command that shows the whole of it on a pair made on the spot: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("demo")(_demo)


def _demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and the numbers.")] = Path("surgery-demo"),
    seed: Annotated[int, typer.Option(help="Of the models, the data and the training.")] = 0,
) -> None:
    """Train a small model, fine-tune it until it forgets, repair it with each method, and show what was measured.

    Offline, in about three minutes. Needs transformers: pip install 'model-surgery\\[demo]'.
    """
    from surgery.demo.run import demo
    from surgery.display import new_console

    demo(out, new_console(), _edit, seed)


def _edit(pre: Path, ft: Path, out: Path, method: str, **options: Any) -> dict[str, Any]:
    from surgery.editing.job import prepare
    from surgery.editing.run import run
    from surgery.methods import METHODS

    text = options.pop("calibration", None)
    job = prepare(pre, ft, METHODS[method](**options), out=out)
    if text is not None:
        from surgery.calibrate.run import Calibration, calibrated

        job = calibrated(job, Calibration(str(text)), device="cpu", advance=lambda done, total: None)
    return run(job)
