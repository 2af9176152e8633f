"""The command that shows the whole of it on a pair made on the spot: demo."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from surgery.commands.builder import command
from surgery.errors import SurgeryError
from surgery.option import option


@dataclass(frozen=True)
class Demo:
    """Where the demo goes."""

    out: Path = option(Path("surgery-demo"), help="Folder for the models and the numbers.")
    seed: int = option(0, help="Of the models, the data and the training.")


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(
        app,
        "demo",
        [Demo],
        _demo,
    )


def _demo(asked: Demo) -> None:
    """Train a small model, fine-tune it until it forgets, repair it with each method, and show what was measured.

    Ends with a search for the best repair. Offline, in about seven minutes. Needs pip install 'model-surgery\\[demo,eval]'.
    """
    from surgery.demo.run import demo
    from surgery.display import new_console

    demo(asked.out, new_console(), _edit, asked.seed)
    _search(asked.out)


def _search(out: Path) -> None:
    """Find the best trade-off on the demo's questions, by the command that anybody would type."""
    from surgery.display import say

    words = ["auto", "--pre", str(out / "pre"), "--ft", str(out / "ft"), "--out", str(out / "best")]
    words += ["--task", str(out / "skills/pairs.jsonl"), "--general", str(out / "skills/general"), "--batch-size", "64"]
    say("", "Which repair is the best trade-off? Half of the questions choose, and half prove:")
    say(f"  {shlex.join(['surgery', *words])}")
    if subprocess.run([sys.executable, "-m", "surgery", *words], check=False).returncode:
        raise SurgeryError("The search failed, as it says above. The models and the table are there all the same.")


def _edit(pre: Path, ft: Path, out: Path, method: str, **options: Any) -> dict[str, Any]:
    from surgery.editing.job import prepare
    from surgery.editing.run import run
    from surgery.methods import METHODS

    text = options.pop("calibration", None)
    job = prepare(pre, ft, METHODS[method](**options), out=out)
    if text is not None:
        from surgery.calibrate.options import Calibration
        from surgery.calibrate.run import calibrated

        job = calibrated(job, Calibration(str(text)), device="cpu", advance=lambda done, total: None)
    return run(job)
