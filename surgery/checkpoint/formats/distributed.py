"""torch's distributed checkpoints (torch.distributed.checkpoint), as FSDP, FSDP2 and accelerate write them.

`.metadata` is a pickle: each tensor's type and shape, the boxes that it is cut into, and for each box the file and the bytes that
hold it, which are a small archive of `torch.save`. Only a few classes may stand in that pickle, and none of them is ever made:
what they hold is kept as plain values and checked. The boxes are put together while a tensor is read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.formats import foreign, pytorch
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear, top_level
from surgery.checkpoint.readable import open_file, read_whole, readable
from surgery.checkpoint.tensor import Handle, Reader, Span, Tensor
from surgery.errors import CheckpointError

NAME, METADATA, ENDING = "distributed", ".metadata", ".distcp"
# accelerate's folder of the model; beside it lie those of optimizers.
OF_MODEL = re.compile(r"pytorch_model_fsdp_[0-9]+/")
MEGATRON = "common.pt"
MAX_METADATA = 100_000_000
# Under what a training keeps other things than the model.
NO_MODEL = re.compile(r"\w*(?:optim|scheduler|dataloader)\w*|train_state|rng\w*|ema\w*")
CLASSES = (
    "Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata BytesStorageMetadata TensorProperties StorageMeta "
    "_MEM_FORMAT_ENCODING MEM_FORMAT_ENCODING _StorageInfo"
).split()
# What a pickle of plain values never has. A place in the memo takes memory, so none may be beyond the pickle's size.
FORBIDDEN = {
    "PERSID",
    "BINPERSID",
    "EXT1",
    "EXT2",
    "EXT4",
    "INST",
    "OBJ",
    "BYTEARRAY8",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
}
OPEN_FILES = 16
Way = tuple[Any, ...]


class _Record:
    """The content of one object of the pickle."""

    values: Any = None

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.values = state

    def get(self, name: str) -> Any:
        """A field's value; None where it has none."""
        return self.values.get(name) if isinstance(self.values, dict) else None


class _Unpickler(pickle.Unpickler):
    """Reads plain values and the few classes of a checkpoint's metadata, whose objects become records."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.") and name in CLASSES:
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in pytorch.DTYPES:
            return name
        if (module, name) == ("torch.serialization", "_get_layout") or module.partition(".")[0] == "pathlib":
            return _Record
        raise pickle.UnpicklingError(f"{module}.{name}")


class Box(NamedTuple):
    """A part of a tensor: where it begins, its shape, and the tensor that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: Tensor


def read(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every tensor of the model in a distributed checkpoint, in its order, reading no numbers and running no code.

    Returns:
        The tensors, and what the user should know.

    Raises:
        CheckpointError: it cannot be read, is damaged, holds no model or several, or lacks a file.
    """
    metadata = _metadata(folder)
    described, stored = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise _damaged(folder)
    keys = {
        key: value
        for key, value in described.items()
        if isinstance(key, str) and type(value).__name__ == "TensorStorageMetadata"
    }
    planned = metadata.get("planner_data")
    names = _names(folder, keys, planned if isinstance(planned, dict) else {})
    places = _places(folder, stored)
    files = _Files(folder)
    try:
        tensors = {name: _tensor(folder, name, key, keys[key], places, files) for name, key in names.items()}
    finally:
        files.close()
    others = [key for key in keys if key not in set(names.values())]
    note = f"{len(others):,} tensors that are no part of the model were left out ({others[0]}, …)." if others else ""
    return tensors, (note,) if note else ()


def _damaged(folder: Path, what: str = "its pickle is damaged") -> CheckpointError:
    return CheckpointError(f"{folder / METADATA}: {what}. {foreign.JOIN.format(where=folder)}")


def _metadata(folder: Path) -> _Record:
    raw = read_whole(folder / METADATA, most=MAX_METADATA)
    try:
        for code, argument, _ in pickletools.genops(raw):
            if code.name in FORBIDDEN or (code.name.endswith("PUT") and int(argument or 0) > len(raw)):
                raise _damaged(folder)
        found = _Unpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        name = str(error)
        if re.fullmatch(r"[\w.]+", name):
            raise _damaged(folder, f"its pickle holds a {name}, which no such checkpoint does; refused") from None
        raise _damaged(folder) from None
    except CheckpointError:
        raise
    except Exception:  # a damaged pickle may raise anything
        raise _damaged(folder) from None
    if type(found).__name__ != "Metadata":
        raise _damaged(folder)
    assert isinstance(found, _Record)
    return found


def _names(folder: Path, keys: Collection[str], planned: Mapping[str, Any]) -> dict[str, str]:
    """The model's tensors: the name of each -> its key.

    A key is all names on the way to the tensor ("app.model.lm_head.weight"); the planner's data has them one by one.
    """
    found: dict[Way, dict[str, str]] = {}
    for key in keys:
        way = planned.get(key)
        known = isinstance(way, tuple) and way and all(isinstance(step, str | int) for step in way)
        steps = [str(step) for step in way] if known and isinstance(way, tuple) else [key]
        outer = steps[:-1] if known else key.split(".")[:2]
        if any(NO_MODEL.fullmatch(step) for step in outer):
            continue
        inside = max((number for number, step in enumerate(steps[:-1], 1) if step in pytorch.NESTED), default=0)
        found.setdefault(tuple(steps[:inside]), {})[".".join(steps[inside:])] = key
    models = [group for group in found if group] or list(found)
    if not models:
        raise CheckpointError(
            f"{folder}: is a distributed checkpoint without the weights of a model, only of what lies beside them, such as an "
            "optimizer. Give the folder of the model, such as pytorch_model_fsdp_0."
        )
    if len(models) > 1:
        said = ", ".join(".".join(group) for group in models[:4])
        raise CheckpointError(f"{folder}: holds several state dicts ({said}). Save the one that you mean by itself.")
    return found[models[0]]


def _places(folder: Path, stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], _Record]:
    """Where each box lies, by its key and where it begins."""
    places = {}
    for index, info in stored.items():
        if not isinstance(index, _Record) or not isinstance(info, _Record):
            raise _damaged(folder)
        places[index.get("fqn"), index.get("offset")] = info
    return places


def _tensor(
    folder: Path,
    name: str,
    key: str,
    described: _Record,
    places: Mapping[tuple[str, tuple[int, ...] | None], _Record],
    files: _Files,
) -> Tensor:
    properties, shape, chunks = (described.get(field) for field in ("properties", "size", "chunks"))
    state = properties.values if isinstance(properties, _Record) else None
    told = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    dtype = pytorch.DTYPES.get(str(told))
    if dtype is None or not _sizes(shape) or not isinstance(chunks, list):
        raise _damaged(folder, f"does not say what {key} is")
    boxes = []
    for chunk in chunks:
        offsets, sizes = (chunk.get(field) for field in ("offsets", "sizes")) if isinstance(chunk, _Record) else (0, 0)
        if not (_sizes(offsets) and _sizes(sizes) and len(offsets) == len(sizes) == len(shape)):
            raise _damaged(folder, f"does not say how {key} is cut")
        if 0 in sizes:
            continue
        held = _piece(folder, name, key, places.get((key, offsets)), files)
        if (held.dtype, held.shape) != (dtype, sizes):
            raise _damaged(
                folder,
                f"says that a part of {key} is {dtype} {list(sizes)}, where {held.path.name} has {held.dtype} {list(held.shape)}",
            )
        boxes.append(Box(offsets, sizes, held))
    if 0 not in shape and not _tiled(shape, boxes):
        raise _damaged(folder, f"gives parts of {key} that do not make up {list(shape)}")
    if len(boxes) == 1:
        return boxes[0].data
    path = folder / METADATA
    data = Pieced(path, (*shape, BITS[dtype] // 8), tuple(boxes)) if boxes else Span(path, 0)
    return Tensor(name, dtype, shape, data)


def _sizes(value: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _piece(folder: Path, name: str, key: str, info: _Record | None, files: _Files) -> Tensor:
    """The tensor that one box is stored as."""
    info = info or _Record()
    file, span = info.get("relative_path"), (info.get("offset"), info.get("length"))
    if not isinstance(file, str) or not _sizes(span):
        raise _damaged(folder, f"does not say where a part of {key} lies")
    offset, length = span
    if info.get("transform_descriptors"):
        raise _damaged(folder, f"says that {key} is compressed, which surgery does not read")
    if not re.fullmatch(r"[\w.-]+\.distcp", file):
        raise CheckpointError(f"{folder / METADATA}: puts {key} in {file!r}, which is no file of this folder; refused.")
    path = folder / file
    opened = files.get(file)
    if offset + length > os.fstat(opened.fileno()).st_size:
        raise CheckpointError(f"{path}: truncated: it should hold {key} up to byte {offset + length:,}. Copy it again.")
    return pytorch.read_one(path, io.BufferedReader(_Part(opened, offset, length)), offset, name)


class _Files:
    """The files of a checkpoint while its headers are read; those of the latest parts stay open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, dict[str, BinaryIO]()

    def get(self, file: str) -> BinaryIO:
        if file not in self.opened:
            if len(self.opened) == OPEN_FILES:
                self.close()
            path = self.folder / file
            if not path.exists():
                raise CheckpointError(
                    f"{path}: is missing, and {METADATA} names it. Copy the files of all processes and machines into one folder."
                )
            with readable(path):
                self.opened[file] = open_file(path, buffering=0)
        return self.opened[file]

    def close(self) -> None:
        for file in self.opened.values():
            file.close()
        self.opened.clear()


class _Part(io.RawIOBase):
    """Bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        self.file.seek(self.begin + self.at)
        got: int = self.file.readinto(view)  # type: ignore[attr-defined]
        self.at += got
        return got


def _tiled(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes fill a tensor and none overlaps another: they are all cells of a grid."""
    cells = 1
    for axis, size in enumerate(shape):
        end = 0
        cuts = sorted({(box.offsets[axis], box.sizes[axis]) for box in boxes})
        for begin, width in cuts:
            if begin != end:
                return False
            end += width
        if end != size:
            return False
        cells *= len(cuts)
    return len(boxes) == len({box.offsets for box in boxes}) == cells


class Runs:
    """A box as runs of bytes that lie together, in the box's file and in the tensor.

    Args:
        shape: of the tensor, its last dimension the bytes of an entry.
        box: the box.
    """

    def __init__(self, shape: Sequence[int], box: Box) -> None:
        sizes, offsets = (*box.sizes, shape[-1]), (*box.offsets, 0)
        axis = len(shape) - 1
        while axis and sizes[axis] == shape[axis]:
            axis -= 1
        strides = [math.prod(shape[number + 1 :]) for number in range(len(shape))]
        self.first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        self.width = sizes[axis] * strides[axis]
        self.outer = list(zip(sizes[:axis], strides[:axis], strict=True))
        self.count = math.prod(sizes[:axis])
        self.end = self.start(self.count - 1) + self.width

    def start(self, number: int) -> int:
        """The byte of the tensor that a run begins at."""
        place = self.first
        for size, stride in reversed(self.outer):
            number, index = divmod(number, size)
            place += index * stride
        return place

    def within(self, begin: int, end: int) -> range:
        """The runs that have a byte in [begin, end) of the tensor."""
        every = range(self.count)
        return range(
            bisect_right(every, begin - self.width, key=self.start),
            bisect_left(every, end, key=self.start),
        )


@dataclass(frozen=True, eq=False)
class Pieced:
    """A tensor in boxes that lie in several files.

    Attributes:
        path: the file to name when something is wrong.
        shape: of the tensor, and the bytes of an entry.
        boxes: cells of a grid that fills it.
    """

    path: Path
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @cached_property
    def runs(self) -> tuple[Runs, ...]:
        return tuple(Runs(self.shape, box) for box in self.boxes)

    def open(self) -> Handle:
        return OpenPieced(self)


class OpenPieced:
    """The boxes of a tensor while they are read; the latest stay open."""

    def __init__(self, data: Pieced) -> None:
        self.data = data
        self.readers: dict[int, Reader] = {}

    def read(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        if end > math.prod(self.data.shape):
            raise EOFError
        for number, runs in enumerate(self.data.runs):
            if runs.first < end and offset < runs.end and (within := runs.within(offset, end)):
                self._fill(self._reader(number), runs, within, offset, view)

    def _fill(self, reader: Reader, runs: Runs, within: range, offset: int, view: memoryview) -> None:
        """Put the bytes of some runs, which lie together in their file, where they belong in a view from `offset` on."""
        places = [
            (max(start, offset), min(start + runs.width, offset + len(view))) for start in map(runs.start, within)
        ]
        begin = within[0] * runs.width + places[0][0] - runs.start(within[0])
        if len(places) == 1:
            reader.fill(begin, view[places[0][0] - offset : places[0][1] - offset])
            return
        held = memoryview(bytearray(sum(last - first for first, last in places)))
        reader.fill(begin, held)
        done = 0
        for first, last in places:
            view[first - offset : last - offset] = held[done : done + last - first]
            done += last - first

    def _reader(self, number: int) -> Reader:
        if number not in self.readers:
            if len(self.readers) == OPEN_FILES:
                self.close()
            self.readers[number] = self.data.boxes[number].data.open()
        return self.readers[number]

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()
        self.readers.clear()


def _find(names: Collection[str]) -> Choice | None:
    if MEGATRON in names:
        return None
    files = top_level(names, (ENDING,))
    if METADATA in names and files:
        return Choice(NAME, (METADATA, *files))
    folders = [name for name in sorted(names) if OF_MODEL.fullmatch(name)]
    if len(folders) > 1:
        raise Unclear(
            f"the weights of {len(folders)} models ({', '.join(folders[:4])}). Give the folder that you mean."
        )
    return Choice(NAME, (METADATA,), inside=folders[0].rstrip("/")) if folders else None


def _open(folder: Path, choice: Choice, _: Base | None) -> Opened:
    tensors, notes = read(folder)
    files = {METADATA: folder / METADATA}
    for path in sorted(folder.glob(f"*{ENDING}")):
        files[path.name] = path
    return Opened(tensors, files, notes=(*choice.notes, *notes))


FORMAT = Format(NAME, _find, _open, borrows=True)
