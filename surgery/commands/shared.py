"""The options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibrate.options import Calibration
from surgery.option import option

if TYPE_CHECKING:
    from surgery.editing.job import Job
    from surgery.methods import Method

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
class Limits:
    """The limit that the winner has to meet."""

    max_forgetting: float | None = option(
        None,
        help="How far the general score may fall below pre's: 0.01 is a point of accuracy, or one percent of likelihood.",
        panel="Goal",
    )
    min_retention: float | None = option(
        None, help="The share of ft's task score that is kept at least, such as 0.99.", panel="Goal"
    )


@dataclass(frozen=True)
class Checks:
    """Checks that an edit makes, or lets pass."""

    allow_nonfinite: bool = option(False, help="Let NaN and Inf of edited tensors pass.")
    strict: bool = option(False, help="Refuse tensors or vocabulary rows that only one side has.")


@dataclass(frozen=True)
class Machine:
    """The device and the threads of an edit."""

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


def with_norms(job: Job, method: Method, calibration: Mapping[str, Any], device: str) -> Job:
    """The job of a method that needs input norms, which are measured here. Its notes are of no concern to other methods.

    Args:
        calibration: options of `surgery.calibrate.options.Calibration`.
    """
    from surgery.calibrate.run import calibrated
    from surgery.display import calibrating
    from surgery.editing.job import replan

    alone = replace(replan(job, method), pair=replace(job.pair, notes=[*job.pair.notes]))
    with calibrating() as advance:
        return calibrated(alone, Calibration(**calibration), device=device, advance=advance)
