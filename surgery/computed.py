"""Tensors whose bytes are made when they are read: the result of an edit, with no file in between.

What reads a checkpoint reads such a one alike, one tensor in memory at a time. The bytes are those that would have been
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Where a tensor's bytes go."""

    def write(self, offset: int, data: Any) -> None:
        """Put bytes at an offset from the tensor's first byte."""


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The data of a tensor that is made anew each time it is opened.

    Attributes:
        path: the file to name when something is wrong.
        nbytes: how many bytes there are.
        make: puts them into a sink.
    """

    path: Path
    nbytes: int
    make: Callable[[Sink], None]

    def open(self) -> Made:
        made = Made(self.nbytes)
        self.make(made)
        return made


class Made:
    """A tensor's bytes in memory: a sink first, then a handle."""

    def __init__(self, nbytes: int) -> None:
        self.view = memoryview(bytearray(nbytes))

    def write(self, offset: int, data: Any) -> None:
        part = memoryview(data).cast("B")
        self.view[offset : offset + len(part)] = part

    def read(self, offset: int, view: memoryview) -> None:
        if offset + len(view) > len(self.view):
            raise EOFError
        view[:] = self.view[offset : offset + len(view)]

    def close(self) -> None:
        self.view = memoryview(b"")
