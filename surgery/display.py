"""Terminal output that all commands share: progress bars, and tables that fit 80 columns and need no colour."""

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

from surgery.option import with_flags
from surgery.text import dumps, readable

# A cell of a bar filled by 0/8 to 8/8; and replacements for terminals that have ASCII only.
EIGHTHS = " ▏▎▍▌▋▊▉█"
PLAIN = str.maketrans(
    {"‖": "|", "Δ": "d", "–": "-", "−": "-", "█": "#", "≤": "<=", "∞": "inf", "±": "+-", "≈": "~", "◆": ">", "…": "."}
    | dict.fromkeys(EIGHTHS[1:4], " ")
    | dict.fromkeys(EIGHTHS[4:8], "#")
)


class Terminal(Console):
    """A rich console that makes all text `readable`, so that no name from a file can command the terminal.

    It interprets no markup and no emoji. A line break is escaped too: print each line by itself.

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
    """Return a console on standard output, 80 columns wide if that is not a terminal."""
    return Terminal(width=None if os.isatty(1) else 80)


def say(*sentences: str) -> None:
    """Print lines without wrapping them, with options of the command line for the parameters that they name."""
    console = new_console()
    for sentence in sentences:
        console.print(with_flags(sentence), soft_wrap=True)


def show_json(document: Any) -> None:
    """Print a document as JSON, for programs."""
    content = dumps(document)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.buffer.write(content)  # in UTF-8 whatever the terminal's encoding
    else:
        sys.stdout.write(content.decode())
    sys.stdout.flush()


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print notes for the user, with options of the command line for the parameters that they name."""
    for note in notes:
        console.print(f"Note: {with_flags(note)}")


def new_table(first: str, *others: str) -> Table:
    """Return an empty table. Columns are aligned right, except the first, "Action" and those without a title."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name in ("", "Action") else "right", no_wrap=True)
    return table


def meter(value: float, largest: float, width: int) -> str:
    """Return a bar of at most `width` characters, full for the largest value."""
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
    """Return a progress bar on standard error, which disappears when it is done; invisible if that is not a terminal.

    Args:
        columns: shown between the bar and the remaining time; by default the number of finished steps.
        silent: invisible on a terminal too.
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
    """Show a progress bar of bytes. Yields the function to call with the number of bytes read since the last call."""
    with new_progress(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)


@contextmanager
def calibrating() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of a model's blocks. Yields the function to call with how many are done, of how many."""
    with new_progress() as bar:
        task = bar.add_task("Calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
