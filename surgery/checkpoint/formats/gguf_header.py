"""The GGUF container: what a file says it holds, checked against what it can hold.

A file is the magic "GGUF", a version, the number of tensors and of key-value pairs, the pairs, one record for each tensor, and
the data, aligned. The gguf package's own reader believes the counts and keeps each entry of a vocabulary; this one reads forward,
passes over what nobody needs, and compares every length with the size of the file before it moves.

Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from surgery.checkpoint.readable import open_file, readable
from surgery.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The types of a value, as struct formats; beside these are strings and arrays.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# Bytes of a string that is kept; a longer value, such as a chat template, is passed over.
MAX_TEXT = 1 << 16
# Bytes of a header. It holds the vocabulary, and stays far below.
MAX_HEADER = 1 << 27
MAX_DIMENSIONS = 4
ALIGNMENT = 32  # unless the file says otherwise


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file, as blocks of `block` entries that take `block_bytes` each; 1 entry where nothing is quantized.

    Attributes:
        type: ggml's name, such as "Q4_K" or "BF16".
        shape: outermost dimension first, as everywhere but in the file.
        begin: its first byte in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    block: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The numbers and short strings of the metadata by key, and the tensors in the order of their records."""

    metadata: dict[str, Any]
    tensors: list[Stored]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header is damaged; or the gguf package is missing.
    """
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"{path}: reading GGUF takes the gguf package. Install it: pip install 'model-surgery[gguf]'."
        )
    with readable(path), open_file(path) as file:
        return _read(_Cursor(path, file, os.fstat(file.fileno()).st_size))


class _Cursor:
    """A place in a file that moves forward only, and never past the end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0

    def skip(self, count: int) -> None:
        self._advance(count)
        self.file.seek(self.at)

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self.file.read(count)

    def _advance(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: its header goes on behind byte {self.size:,}, where the file ends. Download it again."
            )
        if self.at > MAX_HEADER:
            raise self.damaged(f"it is longer than {MAX_HEADER:,} bytes")

    def text(self) -> str | None:
        """A string, None where it is too long to be kept."""
        (length,) = self.numbers("<Q")
        if length > MAX_TEXT:
            self.skip(length)
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a string is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of the metadata, None for an array."""
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"a value has the type {kind}")
        inner, count = self.numbers("<IQ")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(count):
                self.skip(self.numbers("<Q")[0])
        else:
            raise self.damaged(f"an array has entries of the type {inner}")

    def damaged(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the GGUF header is damaged: {fault}. Download it again.")


def _read(cursor: _Cursor) -> Header:
    if cursor.size < 4 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{cursor.path}: not a GGUF file: it does not begin with GGUF. Download it again.")
    (version,) = cursor.numbers("<I")
    if version not in VERSIONS:
        big = " (or big-endian)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{cursor.path}: is of GGUF version {version}{big}; surgery reads the versions 2 and 3, little-endian. Convert the "
            "model again."
        )
    count, pairs = cursor.numbers("<QQ")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key is None or key in metadata:
            raise cursor.damaged("a key is too long" if key is None else f"the key {key!r} is there twice")
        metadata[key] = cursor.value(*cursor.numbers("<I"))
    records: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text()
        if name is None or name in records:
            raise cursor.damaged("a tensor's name is too long" if name is None else f"tensor {name!r} is there twice")
        (dimensions,) = cursor.numbers("<I")
        if dimensions > MAX_DIMENSIONS:
            raise cursor.damaged(f"tensor {name} has {dimensions:,} dimensions")
        shape = cursor.numbers(f"<{dimensions}Q")[::-1]
        records[name] = (shape, *cursor.numbers("<IQ"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"data cannot be aligned to {alignment}")
    start = -(-cursor.at // alignment) * alignment
    return Header(metadata, [_stored(cursor, start, name, *record) for name, record in records.items()])


def _stored(cursor: _Cursor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has the quantization type {kind}, which the installed gguf package does not know. "
            "Update it: pip install -U gguf."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[found]
    if 0 in shape or (shape[-1] if shape else 1) % block:
        raise cursor.damaged(f"tensor {name} of shape {list(shape)} cannot be cut into {found.name} blocks of {block}")
    begin, end = start + offset, start + offset + math.prod(shape) // block * block_bytes
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.path}: truncated: tensor {name} should end at byte {end:,}, the file has {cursor.size:,}. Download it "
            "again."
        )
    return Stored(name, found.name, shape, begin, block, block_bytes)
