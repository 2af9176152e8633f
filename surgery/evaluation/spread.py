"""Models scored by several processes that torchrun starts, each on a device of its own.

Each process scores its share of the models, on all items, and keeps the scores in a folder that all see. There the first process
finds every score, so that what it makes of them is what a process alone would make.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.bench import Observe
from surgery.evaluation.scoring import Scoring
from surgery.evaluation.subject import Subject
from surgery.processes import Process, find_process

if TYPE_CHECKING:
    from surgery.evaluation.scores import Measure

LONGEST = timedelta(days=30)  # for which processes wait for each other


def spread(
    subjects: Sequence[Subject], measures: Sequence[Measure], scoring: Scoring, observe: Observe = lambda *_: None
) -> Scoring | None:
    """Score a process's share of the models, and wait for the others to have scored theirs.

    Args:
        subjects: pre, which the first process scores before the others begin, and others.
        measures: as `scoring` makes them.
        observe: told of the progress of the first process.

    Returns:
        What the first process goes on with, or a process that is alone; None where nothing is left to do.

    Raises:
        OptionError: the processes have no folder to share.
        SurgeryError: pre cannot be scored.
    """
    process = find_process()
    if process is None:
        return scoring
    if scoring.cache is None:
        raise OptionError("Several processes share their scores in a folder that all of them see: give `cache`.")
    scoring = replace(scoring, device=own_device(process, scoring.device))
    first = process.rank == 0
    with _together() as wait, scoring.bench(measures, observe if first else lambda *_: None) as bench:
        if first:
            bench.score(subjects[0])
        wait()
        if not first:
            bench.score(subjects[0])
        for subject in subjects[1:][process.rank :: process.count]:
            with contextlib.suppress(CheckpointError):  # of which the first process tells, when it comes upon it
                bench.score(subject)
        wait()
    return scoring if first else None


def own_device(process: Process, asked: str) -> str:
    """The device that is a process's own, where a GPU was asked for or may be taken."""
    import torch

    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return asked
    return f"cuda:{process.local % torch.cuda.device_count()}"


@contextlib.contextmanager
def _together() -> Iterator[Callable[[], object]]:
    """Yields a function that returns when all processes have called it."""
    from torch import distributed

    distributed.init_process_group("gloo", timeout=LONGEST)
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()
