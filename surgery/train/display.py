"""The view of a training: a progress bar while it runs, and tables at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn

from surgery.display import Words, new_console, new_progress, new_table, show_json
from surgery.option import with_flags
from surgery.processes import is_first
from surgery.text import brief, fixed, readable, share
from surgery.train.report import said

FIRST = 1
SHARES = ("share", "trainable")  # of what is frozen: of all entries; of the layers' that is trained


class Screen:
    """The terminal output of a training. With several processes only the first one prints.

    Args:
        quiet: standard output is only for the report as JSON; sentences go to standard error.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.leads = quiet, is_first()
        self.bar = new_progress(MofNCompleteColumn(), Words("says"), silent=not self.leads)
        self.round, self.begun = 0, (0.0, 0.0)

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, sentence: str) -> None:
        """Print a line, with options for the parameters that it names; on standard error where standard output is for JSON."""
        if not self.leads:
            return
        sentence = with_flags(sentence)
        if self.bar.disable:
            print(readable(sentence), file=sys.stderr if self.quiet else sys.stdout, flush=True)
        else:
            self.bar.console.print(sentence, soft_wrap=True)

    def step(self, number: int, rounds: int, step: int, steps: int, logs: dict[str, float]) -> None:
        """Move the progress bar to a step."""
        tokens = logs.get("num_tokens", 0.0)
        if number != self.round:
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            name = "Training" if rounds == 1 else f"Round {number}/{rounds}"
            self.bar.add_task(name, total=steps, says="")
            self.round, self.begun = number, (time.perf_counter(), tokens)
        spent = time.perf_counter() - self.begun[0]
        speed = f" {(tokens - self.begun[1]) / spent:,.0f} tok/s" if tokens > self.begun[1] and spent > 0 else ""
        says = f"loss {logs['loss']:.3f} lr {logs.get('learning_rate', 0.0):.1e}{speed}"
        self.bar.update(self.bar.task_ids[-1], completed=step, says=says)

    def show_plan(self, found: dict[str, Any]) -> None:
        """Print what a training would do."""
        if not self.leads:
            return
        if self.quiet:
            show_json(found)
            return
        table = new_table("Round", "Rows", "Replayed", "Held out", "Frozen", "Trained of the layers")
        for number, round in enumerate(found["rounds"], FIRST):
            frozen = round["frozen"]
            shares = [share(frozen[key], 2) if frozen else {"share": "0%", "trainable": "100%"}[key] for key in SHARES]
            counts = [f"{round[key]:,}" for key in ("rows", "replayed", "held_out")]
            table.add_row(str(number), *counts, *shares)
        new_console().print(table)

    def show(self, report: dict[str, Any], out: Path) -> None:
        """Print the report of a run and the path of its output."""
        if not self.leads:
            return
        if self.quiet:
            show_json(report)
            return
        console = new_console()
        table = new_table("Round", "Rows", "Steps", "First loss", "Last loss", "Held out", "Seconds")
        for number, round in enumerate(report["rounds"], FIRST):
            losses = [step["loss"] for step in round["steps"]]
            held_out = [one["loss"] for one in round["evaluations"]]
            table.add_row(
                str(number),
                f"{round['rows']:,}",
                f"{len(losses):,}",
                fixed(losses[0] if losses else None),
                fixed(losses[-1] if losses else None),
                fixed(held_out[-1] if held_out else None),
                f"{round['seconds']:.1f}",
            )
        console.print(table)
        if report["continual"]:
            self._show_continual(console, report)
        frozen = report["rounds"][-1]["frozen"]
        if frozen:
            console.print(
                f"Frozen in the last round: {share(frozen['share'], 2)} of all entries. Trained: "
                f"{share(frozen['trainable'], 2)} of the layers'."
            )
        totals = report["totals"]
        changed = share(totals["differ"] / totals["entries"], 2)
        console.print(f"D from the start: {brief(totals['distance_after'])}; entries that changed: {changed}")
        console.print(f"Wrote {out}", soft_wrap=True)

    def _show_continual(self, console: Console, report: dict[str, Any]) -> None:
        found = report["continual"]
        names = [f"Task {number}" for number in range(FIRST, len(found["tasks"]) + FIRST)]
        table = new_table("After round", *names, "OP", "BWT")
        for number, (scores, op, bwt) in enumerate(zip(found["scores"], found["op"], found["bwt"], strict=True), FIRST):
            table.add_row(str(number), *(f"{score:.3f}" for score in scores), f"{op:.3f}", f"{bwt:+.3f}")
        console.print(table)
        console.print(f"{with_flags(said(found['tasks']))}. BWT below 0 is forgetting.")
