"""What the user sees: a progress bar on a terminal, tables that read well at 80 columns and without colour."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from surgery.engines.plan import Step
    from surgery.job import Job

LABELS = {"feed_forward": "feed-forward"}


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error with bytes per second and time left; nothing at all where that is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)


@contextmanager
def calibrating() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error for the blocks of a model that are done; nothing at all where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Calibrating"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_plan(job: Job, *, as_json: bool) -> None:
    """Print what a job would do, by category."""
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in job.steps:
        doing = "copy" if step.pre is None or not step.ft.is_float else type(step.action).__name__.lower()
        groups.setdefault((step.place.category, doing), []).append(step)
    sizes = {
        group: (len(steps), sum(step.ft.entries for step in steps), sum(step.ft.nbytes for step in steps))
        for group, steps in sorted(groups.items())
    }
    if as_json:
        plan = [
            {"category": category, "action": doing, "tensors": tensors, "entries": entries, "bytes": nbytes}
            for (category, doing), (tensors, entries, nbytes) in sizes.items()
        ]
        document = {"method": job.method.name, "output": str(job.out), "bytes": job.nbytes, "plan": plan}
        print(json.dumps({**document, "notes": job.pair.notes}, indent=2))
        return
    table = new_table("Category", "Action", "Tensors", "Entries", "Bytes")
    words = {
        "keep": "keep ft",
        "reset": "reset to pre",
        "prune": "prune",
        "prunerows": "prune",
        "blend": "average",
        "merge": "merge",
        "copy": "copy ft",
    }
    for (category, doing), (tensors, entries, nbytes) in sizes.items():
        table.add_row(label(category), words[doing], f"{tensors:,}", count(entries), size(nbytes))
    console = new_console()
    console.print(table)
    print_notes(console, job.pair.notes)
    console.print(f"Nothing was written. The output would be {job.out}, {size(job.nbytes)}.", soft_wrap=True)


def show_report(report: dict[str, Any], out: Path, *, nbytes: int, seconds: float, as_json: bool) -> None:
    """Print what a run did, by category, how long it took, and where the output is."""
    if as_json:
        from surgery.report import dumps

        sys.stdout.buffer.write(dumps(report))
        sys.stdout.flush()
        return
    table = new_table("Category", "Tensors", "Entries", "To pre", "Sparsity", "Effective", "D before", "D after")
    for category, group in report["categories"].items():
        if group["tensors"]:
            table.add_row(label(category), *_cells(group))
    table.add_section()
    table.add_row("all", *_cells(report["totals"]), style="bold")
    console = new_console()
    console.print(table)
    print_notes(console, report["notes"])
    console.print(f"{size(nbytes)} in {seconds:.1f} s")
    console.print(f"Wrote {out}", soft_wrap=True)


def _cells(group: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{group['tensors']:,}",
        count(group["entries"]),
        count(group["pruned"]),
        percent(group["achieved_sparsity"]),
        percent(group["effective_sparsity"]),
        _distance(group["distance_before"]),
        _distance(group["distance_after"]),
    )


def say(sentence: str) -> None:
    """Print a line."""
    new_console().print(sentence, soft_wrap=True)


def new_console() -> Console:
    """Standard output: 80 columns where it is no terminal, and no text taken for markup."""
    return Console(highlight=False, markup=False, emoji=False, width=None if os.isatty(1) else 80)


def new_table(first: str, *others: str) -> Table:
    """An empty table: names on the left, numbers on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name == "Action" else "right", no_wrap=True)
    return table


def print_notes(console: Console, notes: list[str]) -> None:
    """What the user should know about a pair."""
    for note in notes:
        console.print(f"Note: {readable(note)}")


def readable(text: str) -> str:
    """Text from a file, which may hold anything, commands to the terminal included."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)


def label(category: str) -> str:
    """A category as people write it."""
    return LABELS.get(category, category)


def count(value: int | None) -> str:
    """A number of entries in a few characters: 12.3M."""
    if value is None:
        return "–"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def size(value: int) -> str:
    """1234567 as "1.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def percent(value: float | None) -> str:
    """A share, with two decimals."""
    return "–" if value is None else f"{100 * value:.2f}%"


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
