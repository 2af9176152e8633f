"""The safetensors container: what a file says it holds, checked against what it can hold.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data. The JSON maps a tensor's name to its dtype, shape
and `data_offsets` [begin, end) from the end of the header. Nothing here reads data; nothing in a header is believed before it
was compared with the size of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.container import Container, Shard
from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear, top_level
from surgery.checkpoint.formats.shards import join, numbered_set, read_index, stale_index
from surgery.checkpoint.readable import open_file, readable
from surgery.checkpoint.tensor import Span, Tensor
from surgery.errors import CheckpointError

NAME = "safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Other formats' files.
ADAPTERS, CONSOLIDATED = ("adapter_model.safetensors", "adapters.safetensors"), "consolidated.safetensors"
# The limit of the reference implementation.
MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Header:
    """The content of one safetensors file: tensors in the order of their data, and the free-form metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, not readable, truncated, or its header contradicts itself or the file's size.
    """
    with readable(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if first == b"version ":
            raise CheckpointError(
                f"{path}: is a note of git-lfs where the weights should be: run `git lfs pull` there."
            )
        length = int.from_bytes(first, "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file: its header should be {length:,} bytes long, the file has "
                f"{size:,}. Download or save it again."
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: the header claims {length:,} bytes, more than safetensors allows.")
        raw = file.read(length)
    return _check(path, _parse(path, raw), data_start=8 + length, size=size)


def encode_header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Lay tensors out back to back, in the order given, behind a new header.

    Returns:
        The bytes of the length field and the header, padded to 8 bytes as the format wants, and for each tensor the byte of the
        file that it begins at.
    """
    layout: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    begins = {}
    for tensor in tensors:
        begins[tensor.name] = offset
        layout[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise CheckpointError(f"{path}: the header names a tensor twice. Save the checkpoint again.")
        return names

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object.")
    return header


def _check(path: Path, header: dict[str, Any], *, data_start: int, size: int) -> Header:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise CheckpointError(f"{path}: the header's __metadata__ is not a map of strings.")
    spans = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    spans.sort(key=lambda span: span[1:])
    position = data_start
    for tensor, begin, end in spans:
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {tensor.name} should end at byte {end:,}, the file has {size:,}. "
                "Download or save it again."
            )
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {tensor.name} {fault}: the header is damaged. Save it again.")
        position = end
    if position != size:
        raise CheckpointError(f"{path}: {size - position:,} bytes follow the last tensor: the header is damaged.")
    return Header(path, {tensor.name: tensor for tensor, _, _ in spans}, metadata)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> tuple[Tensor, int, int]:
    """The tensor, and the bytes [begin, end) of the file that hold it."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        well_formed = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) and isinstance(
            dtype, str
        )
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed or not _is_text(name):
        raise CheckpointError(f"{path}: the header's entry for tensor {name} is damaged. Save the checkpoint again.")
    if dtype not in BITS:
        raise CheckpointError(f"{path}: tensor {name} has the type {dtype}, which surgery does not know.")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise CheckpointError(
            f"{path}: the offsets of tensor {name} span {end - begin:,} bytes, which is not what {dtype} of shape {list(shape)} "
            "takes: the header is damaged. Save the checkpoint again."
        )
    begin, end = data_start + begin, data_start + end
    return Tensor(name, dtype, tuple(shape), Span(path, begin)), begin, end


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written again: JSON may hold half a character, such as "\\ud800"."""
    return isinstance(value, str) and not any("\ud800" <= mark <= "\udfff" for mark in value)


def _read_as_one(files: Sequence[str]) -> str:
    return f"There is no {INDEX}: {len(files)} numbered files were read as one model."


def _find(names: Collection[str]) -> Choice | None:
    if SINGLE in names:
        return Choice(NAME, (SINGLE,))
    if INDEX in names:
        return Choice(NAME, (), INDEX)
    loose = [name for name in top_level(names, (".safetensors",)) if name not in (*ADAPTERS, CONSOLIDATED)]
    if len(loose) == 1:
        return Choice(NAME, (loose[0],))
    if not loose:
        return None
    try:
        return Choice(
            NAME,
            numbered_set(loose),
            notes=(_read_as_one(loose),),
        )
    except Unclear as unclear:
        raise Unclear(
            f"{len(loose)} safetensors files but no {INDEX}, {unclear}. Give the one you mean by its own path."
        ) from None


def _open(folder: Path, choice: Choice, _: Base | None) -> Opened:
    choice = (stale_index(folder, choice, ".safetensors") if choice.index else None) or choice
    weight_map, metadata = read_index(folder, choice, ".safetensors") if choice.index else ({}, None)
    files = {name: folder / name for name in sorted(set(weight_map.values()) or set(choice.files))}
    headers = {name: read_header(path) for name, path in files.items()}
    tensors = join(folder, choice, {name: header.tensors for name, header in headers.items()}, weight_map)
    shards = {}
    for file, header in headers.items():
        held = tuple(name for name, tensor in header.tensors.items() if tensors.get(name) is tensor)
        if held:
            shards[file] = Shard(held, header.metadata)
    return Opened(tensors, files, Container(shards, metadata if choice.index or len(shards) == 1 else {}), choice.notes)


FORMAT = Format(NAME, _find, _open, (".safetensors",))
