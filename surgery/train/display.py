"""What a training shows: a line that moves on a terminal, and a table at the end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery import display
from surgery.provenance import dumps

FIRST = 1


class Screen:
    """The terminal of a run; only the first process of several has one.

    Args:
        quiet: print the report as JSON in the end, and no sentence before it.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.leads = quiet, os.environ.get("RANK", "0") == "0"
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TimeRemainingColumn(compact=True),
        )
        silent = not self.leads or not sys.stderr.isatty()
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=silent)
        self.round, self.begun = 0, (0.0, 0.0)

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, sentence: str) -> None:
        """Print a line; on standard error where standard output is for JSON."""
        if not self.leads:
            return
        line = display.readable(sentence)
        if self.bar.disable:
            print(line, file=sys.stderr if self.quiet else sys.stdout, flush=True)
        else:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, number: int, rounds: int, step: int, steps: int, logs: dict[str, float]) -> None:
        """Show a step."""
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

    def show(self, report: dict[str, Any], out: Path) -> None:
        """Print what a run did and where its output is."""
        if not self.leads:
            return
        if self.quiet:
            sys.stdout.buffer.write(dumps(report))
            sys.stdout.flush()
            return
        console = display.new_console()
        table = display.new_table("Round", "Rows", "Steps", "First loss", "Last loss", "Held out", "Seconds")
        for number, round in enumerate(report["rounds"], FIRST):
            losses = [step["loss"] for step in round["steps"]]
            held_out = [one["loss"] for one in round["evaluations"]]
            table.add_row(
                str(number),
                f"{round['rows']:,}",
                f"{len(losses):,}",
                _loss(losses[0] if losses else None),
                _loss(losses[-1] if losses else None),
                _loss(held_out[-1] if held_out else None),
                f"{round['seconds']:.1f}",
            )
        console.print(table)
        if report["continual"]:
            self._show_continual(console, report)
        frozen = report["rounds"][-1]["frozen"]
        if frozen:
            console.print(f"Frozen in the last round: {display.percent(frozen['share'])} of all entries.")
        totals = report["totals"]
        far = "–" if totals["distance_after"] is None else f"{totals['distance_after']:.3g}"
        changed = display.percent(totals["differ"] / totals["entries"])
        console.print(f"D from the start: {far}; entries that changed: {changed}")
        console.print(f"Wrote {out}", soft_wrap=True)

    def _show_continual(self, console: Console, report: dict[str, Any]) -> None:
        found = report["continual"]
        names = [f"Task {number}" for number in range(FIRST, len(found["scores"]) + FIRST)]
        table = display.new_table("After round", *names, "OP", "BWT")
        for number, (scores, op, bwt) in enumerate(zip(found["scores"], found["op"], found["bwt"], strict=True), FIRST):
            table.add_row(str(number), *(f"{score:.3f}" for score in scores), f"{op:.3f}", f"{bwt:+.3f}")
        console.print(table)
        console.print("Scores are minus the loss of held-out answers. BWT below 0 is forgetting.")


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
