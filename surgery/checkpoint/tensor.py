"""One tensor of a checkpoint, whatever file it lies in: its name, type and shape, and a way to read any of its bytes.

Formats differ in the `Data` behind a tensor: a run of bytes in a file, rows gathered from several, numbers that are computed
while they are read. Everything above sees row-major little-endian bytes of the tensor's type and reads them in chunks, so that
no format needs a tensor in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from surgery.checkpoint.dtypes import BITS, FLOAT_BITS, QUANTIZED_BITS
from surgery.checkpoint.readable import open_file
from surgery.errors import CheckpointError


class Handle(Protocol):
    """Data while it is open, for one thread."""

    def read(self, offset: int, view: memoryview) -> None:
        """Fill the view with the bytes from an offset on.

        Raises:
            EOFError: a file ends before.
            OSError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of files and memory."""


class Data(Protocol):
    """Where a tensor's numbers are."""

    @property
    def path(self) -> Path:
        """The file to name when something is wrong with them."""

    def open(self) -> Handle:
        """Begin to read.

        Raises:
            OSError: a file cannot be opened.
        """


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its type as safetensors names it, its shape, and its data from the byte `start` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Data
    start: int = 0

    @property
    def path(self) -> Path:
        return self.data.path

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.entries * BITS[self.dtype] + 7) // 8

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_BITS

    @property
    def is_quantized(self) -> bool:
        return self.dtype in QUANTIZED_BITS

    def rows(self, first: int, last: int) -> Tensor:
        """The slice [first, last) of the outermost dimension."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(self, shape=(last - first, *self.shape[1:]), start=self.start + first * row)

    def open(self) -> Reader:
        """Begin to read, as a context manager.

        Raises:
            CheckpointError: a file cannot be opened.
        """
        return Reader(self)


class Reader:
    """A tensor opened for reading, by one thread."""

    def __init__(self, tensor: Tensor, handle: Handle | None = None) -> None:
        self.tensor = tensor
        try:
            self.handle = handle or tensor.data.open()
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: cannot be read ({error.strerror}).") from error

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def rows(self, first: int, last: int) -> Reader:
        """A reader of the slice [first, last) of the outermost dimension, open as long as this one."""
        return Reader(self.tensor.rows(first, last), self.handle)

    def fill(self, offset: int, view: memoryview) -> int:
        """Read as many bytes as the view holds, from an offset within the tensor on; return that number.

        Raises:
            CheckpointError: a file ends before, or cannot be read.
        """
        try:
            self.handle.read(self.tensor.start + offset, view)
        except EOFError:
            raise CheckpointError(
                f"{self.tensor.path}: ends in the middle of tensor {self.tensor.name}: it changed while it was read."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.tensor.path}: cannot be read ({error.strerror}).") from error
        return len(view)

    def close(self) -> None:
        """Let go of files and memory."""
        self.handle.close()


def read_bytes(tensor: Tensor) -> bytes:
    """All bytes of a small tensor.

    Raises:
        CheckpointError: its file ends before, or cannot be read.
    """
    with tensor.open() as reader:
        content = bytearray(tensor.nbytes)
        reader.fill(0, memoryview(content))
    return bytes(content)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one file, from `begin` on."""

    path: Path
    begin: int

    def open(self) -> Handle:
        return OpenSpan(open_file(self.path, buffering=0), self.begin)


class OpenSpan:
    """A file, read from a byte on."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self.file, self.begin = file, begin

    def read(self, offset: int, view: memoryview) -> None:
        self.file.seek(self.begin + offset)
        read_into(self.file, view)

    def close(self) -> None:
        self.file.close()


def read_into(file: BinaryIO, view: memoryview) -> None:
    """Fill the view from where an unbuffered file stands.

    Raises:
        EOFError: the file ends before.
    """
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got


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
