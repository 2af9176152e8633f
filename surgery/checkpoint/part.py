"""The share of a draft that one of several processes writes: whole files of the output, and a journal of its own.

The processes may be started together (torchrun) or one after another (a job array), on one machine or on several that see one
file system. Each holds the lock of its own journal while it works, and that of the draft's journal for the moments in which it
joins the draft and leaves it; the one that leaves last finds that all have written theirs, and lets the output appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.errors import OptionError
from surgery.processes import find_process


@dataclass(frozen=True)
class Part:
    """One of several processes.

    Attributes:
        number: from 1.
        count: how many there are.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def journal(self) -> str:
        """The name of its journal in the draft."""
        return f"surgery-journal-{self.number}-of-{self.count}.jsonl"

    @property
    def all(self) -> list[Part]:
        return [Part(number, self.count) for number in range(1, self.count + 1)]

    def files(self, sizes: Mapping[str, int]) -> list[str]:
        """Which files it writes, so that each process has about as many bytes.

        Args:
            sizes: name -> bytes, of all files.
        """
        loads, own = [0] * self.count, list[str]()
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            least = loads.index(min(loads))
            loads[least] += sizes[name]
            if least == self.number - 1:
                own.append(name)
        return own


def find_part(asked: str | None) -> Part | None:
    """The part that was asked for, such as "3/16", or torchrun's in the environment; None for a process that is alone.

    Raises:
        OptionError: it is no part, or both say something.
    """
    process = find_process()
    if asked is None:
        return None if process is None else Part(process.rank + 1, process.count)
    if process is not None:
        raise OptionError("`part` is for processes that are started one by one: leave it out under torchrun.")
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", asked)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError(f"`part` is a number and how many there are, such as 3/16, not {asked!r}.")
    return Part(int(found[1]), int(found[2])) if int(found[2]) > 1 else None
