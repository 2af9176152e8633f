"""What the user sees: a progress bar on a terminal, tables that read well at 80 columns and without colour."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    pass

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
