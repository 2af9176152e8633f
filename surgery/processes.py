"""This process's place among those that torchrun or accelerate launch started together."""

from __future__ import annotations

import os
from dataclasses import dataclass

SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # by every launcher; one alone may be another program's


@dataclass(frozen=True)
class Process:
    """One of several processes.

    Attributes:
        rank: its number, from 0; the first one shows the result.
        count: how many there are.
        local: its number among those of its machine.
    """

    rank: int
    count: int
    local: int


def find_process() -> Process | None:
    """This process's place among the others; None for a process that is alone."""
    if not all(name in os.environ for name in SET) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    """Whether this process shows and writes results: it is alone, or the first of several."""
    process = find_process()
    return process is None or process.rank == 0
