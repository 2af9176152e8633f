"""A task vector in a file of its own: where an edited checkpoint differs from its base, and the bits that it has there.

The file is safetensors. For each tensor that differs there are

    NAME:mask   U8 [⌈n/8⌉]  one bit for each of the n entries, lowest bit first: set where the bits are not the base's
    NAME:kept   ft's type [k]  the bits of the set entries, in their order

or, where the base has no such tensor or not one entry of it is left, NAME:whole, in ft's type and shape. The metadata names the
base and holds, as JSON under "document", what is needed to write the checkpoint again: its tensors and how its files are cut,
the checksum of every tensor of the base and of the result, and the report of the method.

The sizes are known only in the end. So every tensor is collected in files of its own in a hidden sibling folder, and these are
put together behind one header when all are complete; the file appears by a rename.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from surgery.checkpoint.beside import Beside
from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.companions import travels
from surgery.checkpoint.dtypes import BITS, RAW, Array, narrow, widen
from surgery.checkpoint.durable import explained, sync_folder, tried
from surgery.checkpoint.formats.safetensors import encode_header, read_header
from surgery.checkpoint.listing import JOURNAL
from surgery.checkpoint.output import appear_file
from surgery.checkpoint.tensor import Reader, Span, Tensor
from surgery.errors import CheckpointError, OutputError
from surgery.interrupt import postponed, uninterrupted
from surgery.paths import Kind

FORMAT = "surgery-task-vector"
FILE = "file:"
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Delta:
    """A task-vector file, opened: its metadata, its "document", and the stored parts by name."""

    path: Path
    metadata: dict[str, str]
    document: dict[str, Any]
    parts: dict[str, Tensor]


def open_delta(path: Path) -> Delta:
    """Read the header of a task-vector file.

    Raises:
        CheckpointError: it is missing, damaged, or something else.
    """
    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no task vector of surgery. Make one with surgery extract.")
    try:
        document = json.loads(header.metadata["document"])
        for tensor in document["tensors"]:
            _check_parts(path, tensor, header.tensors)
        names = {tensor["name"] for tensor in document["tensors"]}
        listed = [name for shard in document["shards"].values() for name in shard["names"]]
        complete = sorted(listed) == sorted(names) == sorted(tensor["name"] for tensor in document["tensors"])
        complete = complete and all(map(_is_shard, document["shards"])) and all(map(_is_companion, document["files"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise CheckpointError(f"{path}: its metadata is damaged. Extract the task vector again.")
    return Delta(path, header.metadata, document, header.tensors)


def _is_shard(name: str) -> bool:
    """Return whether a file of weights may be written under this name, in the output folder itself."""
    return PurePosixPath(name).name == name and "\\" not in name and name.endswith(".safetensors")


def _is_companion(name: str) -> bool:
    """Return whether a file beside the weights may have this name: one that travels, and stays inside the output folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", ":"} and travels(name)


def _check_parts(path: Path, tensor: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
    name, dtype, shape = tensor["name"], tensor["dtype"], tuple(tensor["shape"])
    wanted = Tensor(name, dtype, shape, Span(path, 0))
    mask, kept, whole = (parts.get(f"{name}:{kind}") for kind in ("mask", "kept", "whole"))
    if whole is not None:
        fits = (whole.dtype, whole.shape) == (dtype, shape)
    elif mask is not None and kept is not None:
        fits = (mask.dtype, mask.shape) == ("U8", (-(-wanted.entries // 8),)) and kept.dtype == dtype
    else:
        fits = mask is None and kept is None and tensor["base"] is not None
    if not fits or any(type(size) is not int or size < 0 for size in shape) or dtype not in BITS:
        raise CheckpointError(f"{path}: what it holds of tensor {name} is damaged. Extract the task vector again.")


def extracted(path: Path) -> bool:
    """Return whether a file is a task vector that surgery wrote."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except CheckpointError:
        return False


DELTA = Kind("task vector", (".safetensors",), extracted)


class DeltaDraft:
    """The folder in which a task-vector file is collected.

    Leaving it without `commit` removes it, so that an error or Ctrl-C leaves nothing behind.

    Args:
        out: the file to write, checked.
        replace: a task vector that is there may be replaced.

    Raises:
        OutputError: another run writes it, or the disk is full or not writable.
    """

    def __init__(self, out: Path, *, replace: bool) -> None:
        self.out, self.replace = out, replace
        self.place = Beside(out, "surgery-draft", JOURNAL)
        self.sinks: dict[str, DeltaSink] = {}
        self.numbers = itertools.count()  # safe between threads
        self.left: list[str] = []

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.place.folder

    def __enter__(self) -> DeltaDraft:
        try:
            # Ctrl-C waits until it is known what there is to remove.
            with explained(self.folder), postponed():
                self.place.take()
                self.place.clear()
                self.place.begin(pid=os.getpid())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with uninterrupted():
            for sink in self.sinks.values():
                tried(sink.close, "")
            self.left += self.place.remove()
            if self.left and isinstance(error, OutputError):
                error.args = (f"{error} {self.left[0]}",)

    def sink(self, ft: Tensor, pre: Tensor | None) -> DeltaSink:
        """Return where to write the bytes of an edited tensor; its base is read beside them."""
        sink = DeltaSink(ft, pre, self.place, f"{next(self.numbers):06d}")
        self.sinks[ft.name] = sink
        return sink

    def commit(self, metadata: Mapping[str, str], files: Mapping[str, bytes]) -> int:
        """Put the parts together, make them durable, and let the file appear; return its size.

        Args:
            metadata: the header's.
            files: contents to add, by name.

        Raises:
            OutputError: the disk is full, or something else is at `out` now.
        """
        with explained(self.folder):
            parts: list[tuple[Tensor, Path | bytes]] = []
            for sink in self.sinks.values():
                parts += sink.parts()
            for name, text in files.items():
                parts.append((Tensor(FILE + name, "U8", (len(text),), Span(self.out, 0)), text))
            # The widest first, so that every part is aligned.
            parts.sort(key=lambda part: -BITS[part[0].dtype])
            header, _ = encode_header([tensor for tensor, _ in parts], metadata)
            made = self.folder / "task-vector"
            with os.fdopen(self.place.open(made.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(header)
                for _, content in parts:
                    if isinstance(content, bytes):
                        file.write(content)
                        continue
                    with content.open("rb") as part:
                        shutil.copyfileobj(part, file, COPY_BYTES)
                    content.unlink()
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            with uninterrupted():
                appear_file(made, self.out, DELTA, replace=self.replace)
                tried(lambda: sync_folder(self.out.parent), "")
        return size


class DeltaSink:
    """Takes the bytes of one edited tensor, from the first to the last, and keeps those that the base does not have."""

    def __init__(self, ft: Tensor, pre: Tensor | None, place: Beside, stem: str) -> None:
        self.ft, self.pre = ft, pre
        self.word = np.dtype(f"u{BITS[ft.dtype] // 8}")
        self.reader: Reader | None = pre.open() if pre is not None else None
        self.mask, self.kept = place.folder / f"{stem}.mask", place.folder / f"{stem}.kept"
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.files = [os.fdopen(place.open(path.name, new), "wb") for path in (self.mask, self.kept)]
        self.bits = np.empty(0, np.bool_)
        self.position = self.count = 0
        self.base_checksum, self.checksum = Checksum(), Checksum()

    def write(self, offset: int, data: Any) -> None:
        """Put the next bytes; `offset` is that of the first of them in the tensor."""
        if offset != self.position * self.word.itemsize:
            raise ValueError("the parts of a tensor come in order")
        self.checksum.add(offset, data)
        out = np.frombuffer(data, self.word)
        differ = np.ones(len(out), np.bool_)
        shared = min(len(out), max(self.pre.entries - self.position, 0)) if self.pre else 0
        if shared:
            differ[:shared] = out[:shared] != self._base(shared)
        kept = out[differ]
        self.files[1].write(kept)
        self.count += len(kept)
        self.position += len(out)
        self.bits = np.concatenate([self.bits, differ])
        self._pack(len(self.bits) // 8 * 8)

    def close(self) -> None:
        """Write what is left of the mask and close the files; again does nothing."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None
        if not self.files[0].closed:
            self._pack(len(self.bits))
        for file in self.files:
            file.close()

    def parts(self) -> list[tuple[Tensor, Path | bytes]]:
        """List the parts that the file stores of this tensor, each with the place where its bytes are now."""
        name, n = self.ft.name, self.ft.entries
        if self.pre is not None and self.count == 0:
            return []
        if self.count == n:
            return [(Tensor(f"{name}:whole", self.ft.dtype, self.ft.shape, Span(self.kept, 0)), self.kept)]
        mask = Tensor(f"{name}:mask", "U8", (-(-n // 8),), Span(self.mask, 0))
        kept = Tensor(f"{name}:kept", self.ft.dtype, (self.count,), Span(self.kept, 0))
        return [(kept, self.kept), (mask, self.mask)]

    def _pack(self, count: int) -> None:
        self.files[0].write(np.packbits(self.bits[:count], bitorder="little"))
        self.bits = self.bits[count:]

    def _base(self, count: int) -> Array:
        assert self.pre is not None
        assert self.reader is not None
        raw = read_entries(self.reader, self.position, count)
        self.base_checksum.add(self.position * BITS[self.pre.dtype] // 8, raw)
        return as_words(raw, self.pre.dtype, self.ft.dtype)


def read_entries(reader: Reader, position: int, count: int) -> bytearray:
    """Read the bytes of `count` entries from `position` on."""
    size = BITS[reader.tensor.dtype] // 8
    raw = bytearray(count * size)
    reader.fill(position * size, memoryview(raw))
    return raw


def as_words(raw: bytearray, pre: str, ft: str) -> Array:
    """Return entries of type pre, cast to ft as the edit casts them: the bits, as unsigned integers."""
    word = np.dtype(f"u{BITS[ft] // 8}")
    if pre == ft:
        return np.frombuffer(raw, word)
    with np.errstate(all="ignore"):
        return narrow(widen(pre, np.frombuffer(raw, RAW[pre])), ft).view(word)
