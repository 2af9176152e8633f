"""What the user sees: progress bars on a terminal, and tables that read well at 80 columns and without colour."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from surgery.text import dumps, readable

# Parts of a cell, eighth by eighth, and what stands for each character where the terminal has ASCII only.
EIGHTHS = " ▏▎▍▌▋▊▉█"
PLAIN = str.maketrans(
    {"‖": "|", "Δ": "d", "–": "-", "−": "-", "█": "#", "≤": "<=", "∞": "inf", "±": "+-", "≈": "~", "◆": ">", "…": "."}
    | dict.fromkeys(EIGHTHS[1:4], " ")
    | dict.fromkeys(EIGHTHS[4:8], "#")
)


class Terminal(Console):
    """A rich console through which no text from a file can command the terminal: cells and lines are made `readable`.

    Text is printed as it is, without markup, emoji or highlighting. A line break in it is escaped too: print line by line.

    Raises:
        BrokenPipeError: whoever reads the output went away.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        shown = readable(text)
        return super().render_str(shown.translate(PLAIN) if self.options.ascii_only else shown, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def new_console() -> Terminal:
    """Standard output: 80 columns wide where it is no terminal."""
    return Terminal(width=None if os.isatty(1) else 80)


def say(*sentences: str) -> None:
    """Print lines, each as long as it is."""
    console = new_console()
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)


def show_json(document: Any) -> None:
    """Print a document as JSON, to be read by a program."""
    content = dumps(document)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.buffer.write(content)  # in UTF-8 whatever the terminal's encoding
    else:
        sys.stdout.write(content.decode())
    sys.stdout.flush()


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print what the user should know."""
    for note in notes:
        console.print(f"Note: {note}")


def new_table(first: str, *others: str) -> Table:
    """An empty table: names on the left, numbers on the right. A column without a title, or called "Action", holds words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name in ("", "Action") else "right", no_wrap=True)
    return table


def meter(value: float, largest: float, width: int) -> str:
    """A bar of up to `width` characters, full for the largest value."""
    full, rest = divmod(round(value / largest * width * 8) if largest else 0, 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


class Words(ProgressColumn):
    """A column of a progress bar that shows a field of its task."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def render(self, task: Task) -> Text:
        return Text(readable(str(task.description if self.field == "description" else task.fields[self.field])))


def new_progress(*columns: ProgressColumn, silent: bool = False) -> Progress:
    """A bar on standard error that disappears when it is done; nothing at all where that is no terminal.

    Args:
        columns: between the bar and the time that is left; by default how many steps of how many are done.
        silent: show nothing on a terminal either.
    """
    shown = (
        Words("description"),
        BarColumn(None),
        *(columns or (MofNCompleteColumn(),)),
        TimeRemainingColumn(compact=True),
    )
    hidden = silent or not sys.stderr.isatty()
    return Progress(*shown, console=Terminal(stderr=True), transient=True, disable=hidden)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, with their speed."""
    with new_progress(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)


@contextmanager
def calibrating() -> Iterator[Callable[[int, int], None]]:
    """A bar of the blocks of a model that are done."""
    with new_progress() as bar:
        task = bar.add_task("Calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
