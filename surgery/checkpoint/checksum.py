"""A checksum of a tensor's bytes, for noticing accidents: another base, a file that was damaged on its way.

It is a sum over the tensor's words, so that parts can be added in any order, and costs little beside the copy. It is no proof
against malice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery import kernels


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
        kernels.checksum(view, offset // 4, self.sums)

    def text(self) -> str:
        """32 hexadecimal digits."""
        return "".join(f"{int(part):016x}" for part in self.sums)
