"""A checksum of a tensor's bytes, for noticing accidents: another base, a file that was damaged on its way.

It is a sum over the tensor's words, so that parts can be added in any order, and costs little beside the copy. It is no proof
against malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery import native
from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tensor import Tensor

READ_BYTES = 1 << 20  # a multiple of 4, the checksum's word


class Checksum:
    """The checksum of the parts that were added so far."""

    def __init__(self) -> None:
        self.sums = np.zeros(2, np.uint64)

    def add(self, offset: int, data: Any) -> None:
        """Add bytes that stand at an offset from the tensor's first byte; each byte once, in any order."""
        view = memoryview(data).cast("B")
        before, after = offset % 4, -(offset + len(view)) % 4
        if before or after:
            view = memoryview(bytes(before) + view.tobytes() + bytes(after))
        _add_words(view, offset // 4, self.sums)

    def text(self) -> str:
        """32 hexadecimal digits."""
        return "".join(f"{int(part):016x}" for part in self.sums)


def _add_words(data: memoryview, first: int, sums: NDArray[np.uint64]) -> None:
    """Add Σw and Σi·w to sums, modulo 2^64: w the 32-bit little-endian words of data, i their positions, from `first` on.

    Together they notice any change that an accident makes, in whatever order the parts of a tensor are added.
    """
    words = np.frombuffer(data, "<u4")
    if native.compiled:
        native.compiled.library.checksum(words.ctypes.data, len(words), first, sums.ctypes.data)
        return
    places = np.arange(first, first + len(words), dtype=np.uint64)
    sums += np.array([words.sum(dtype=np.uint64), (places * words).sum(dtype=np.uint64)], np.uint64)


def checksum_of(tensor: Tensor, tick: Callable[[int], None] = lambda _: None) -> str:
    """The checksum of a tensor's bytes, which are read for it.

    Args:
        tick: called with the number of bytes that were read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    checksum, buffer = Checksum(), memoryview(bytearray(min(READ_BYTES, tensor.nbytes)))
    with tensor.open() as reader:
        for start in range(0, tensor.nbytes, READ_BYTES):
            part = buffer[: min(READ_BYTES, tensor.nbytes - start)]
            reader.fill(start, part)
            checksum.add(start, part)
            tick(len(part))
    return checksum.text()


def fingerprint(checksums: Mapping[str, str]) -> str:
    """The SHA-256 of tensors' names and checksums."""
    return hashlib.sha256("\n".join(f"{name} {sums}" for name, sums in sorted(checksums.items())).encode()).hexdigest()


def weights_fingerprint(checkpoint: Checkpoint, known: Mapping[str, str] | None = None) -> str:
    """The fingerprint of all tensors of a checkpoint, which are read for it.

    Args:
        known: the checksums of those that were read already.

    Raises:
        CheckpointError: a file cannot be read.
    """
    known = known or {}
    return fingerprint({name: known.get(name) or checksum_of(tensor) for name, tensor in checkpoint.tensors.items()})
