"""One name for the weights of a checkpoint, whatever files they lie in: for telling whether something was made for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tensor import Tensor

CHUNK = 1 << 20


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
    return fingerprint({name: known.get(name) or _checksum(tensor) for name, tensor in checkpoint.tensors.items()})


def _checksum(tensor: Tensor) -> str:
    checksum, buffer = Checksum(), memoryview(bytearray(min(CHUNK, tensor.nbytes)))
    with tensor.open() as reader:
        for start in range(0, tensor.nbytes, CHUNK):
            part = buffer[: min(CHUNK, tensor.nbytes - start)]
            reader.fill(start, part)
            checksum.add(start, part)
    return checksum.text()
