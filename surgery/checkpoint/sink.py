"""Where the bytes of one tensor go in a file that is being written."""

from __future__ import annotations

import os
import threading
from typing import Any

from surgery.checkpoint.checksum import Checksum

WRITE_BYTES = 1 << 20


class Sink:
    """The place of one tensor in its shard."""

    def __init__(self, file: int, begin: int, lock: threading.Lock) -> None:
        self.file, self.begin, self.lock = file, begin, lock
        self.checksum = Checksum()

    def write(self, offset: int, data: Any) -> None:
        """Put bytes at an offset from the tensor's first byte; each byte once."""
        view = memoryview(data).cast("B")
        self.checksum.add(offset, view)
        # One writer a file: the kernel's own lock would let the others spin.
        for start in range(0, len(view), WRITE_BYTES):
            with self.lock:
                write_at(self.file, view[start : start + WRITE_BYTES], self.begin + offset + start)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Put bytes at an offset in an open file."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
