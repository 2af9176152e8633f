"""The options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.option import option

PRE = "The pre-trained model: a folder, a file, or a hub id with an optional @revision."
FT = "The fine-tuned model or LoRA adapter, likewise."
FORCE = "Replace an earlier output of surgery; nothing else is ever replaced."


@dataclass(frozen=True)
class Pair:
    """One pair of models."""

    pre: str = option(help=PRE)
    ft: str = option(help=FT)


@dataclass(frozen=True)
class Models:
    """The pre-trained model and, for a merge, one or more fine-tuned ones."""

    pre: str = option(help=PRE)
    # A list everywhere, since a single option given twice would silently be the last.
    ft: tuple[str, ...] = option(
        help=f"{FT} Repeatable for ties and dare: what is not merged is the first's.",
    )


@dataclass(frozen=True)
class Checks:
    """What an edit is to let pass."""

    allow_nonfinite: bool = option(False, help="Let NaN and Inf of edited tensors pass.")
    strict: bool = option(False, help="Refuse tensors or vocabulary rows that only one side has.")


@dataclass(frozen=True)
class Machine:
    """What an edit runs on."""

    device: str = option(
        "auto",
        help="auto, cpu, cuda or cuda:N. [b]auto[/b] is the processor: it keeps up with its disk, so a GPU waits too.",
    )
    workers: int | None = option(None, help="Threads.", shown="one for each core, at most 8")


@dataclass(frozen=True)
class Json:
    """The report for programs."""

    as_json: bool = option(False, flag="--json", help="Print the report as JSON.")


@dataclass(frozen=True)
class Shown:
    """Where a comparison is shown."""

    report: Path | None = option(
        None, metavar="DIR", help="Write a page (index.html), plots, results.json and .csv to this folder."
    )
    as_json: bool = option(False, flag="--json", help="Print everything as JSON, each item too.")
