"""torch's own files (`pytorch_model.bin`, `.pth`, `.pt`): a zip archive of a pickle and, uncompressed, one record per storage.

`torch.load` runs the pickle with `weights_only=True` and no numbers: it tells each tensor's type, shape, strides and the byte of
the file that its storage begins at. The numbers are read later, from the file. What the pickle says is held against the archive's
own list of records, so that no tensor reaches beyond the record that it lies in.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import BITS, TORCH
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear, top_level
from surgery.checkpoint.formats.shards import join, numbered_set, read_index, stale_index
from surgery.checkpoint.readable import open_file, readable
from surgery.checkpoint.tensor import Handle, Span, Tensor, read_into
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

NAME = "pytorch"
SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ENDINGS = (".pth", ".pt", ".bin", ".ckpt")
# What a training leaves beside the weights in the same format, and other formats' files.
NO_WEIGHTS = re.compile(
    r"(training_args|common|optimizer|scheduler|rng_state\w*|scaler|\w*mp_rank\w*|tokenizer\w*|model_world_size\w*)\.(bin|pth?)"
    r"|adapter_model\..*|consolidated\.[0-9]{2}\.pth|pytorch_model-[0-9-of]+\.bin\.tmp"
)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
MAX_PICKLE = 100_000_000  # as for the header of a safetensors file
# Where training programs keep the weights among other things.
NESTED = ("state_dict", "model", "module", "model_state_dict")
# Entries that a strided tensor gathers at once: those of an engine's chunk.
GATHERED = 1 << 18
DTYPES = {theirs: ours for ours, theirs in TORCH.items()}
AGAIN = "Download or save it again."
SAFER = "Take the model as safetensors, from a source that you trust."


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file that `torch.save` wrote, in its order, reading no numbers and running no code of the file.

    The file holds a state dict, or a dict with one under one of the names in `NESTED`; what else is in it is left out.
    Parameters count as tensors. Tensors that share a storage, as tied weights do, become two tensors.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is no such file, would run code, was saved in torch's format from
            before 1.6, by TorchScript or on a big-endian machine, or holds a tensor of a kind that safetensors has no name for.
    """
    with _archive(path), open_file(path) as file:
        records = _records(path, file)
    return {name: _tensor(path, name, tensor, records) for name, tensor in _state_dict(path, _load(path)).items()}


def read_one(path: Path, file: BinaryIO, begin: int, name: str) -> Tensor:
    """The one tensor that `torch.save` wrote into a part of a file, likewise.

    Args:
        path: the file.
        file: that part of it, opened, as if it were a file of its own.
        begin: the byte of the whole file that the part begins at.
        name: what the tensor is called.

    Raises:
        CheckpointError: as `read`, or it is no single tensor.
    """
    import torch

    with _archive(path):
        records = _records(path, file)
    file.seek(0)
    held = _load(path, file)
    if not isinstance(held, torch.Tensor):
        raise CheckpointError(f"{path}: holds no tensor where {name} should be: the file is damaged. {AGAIN}")
    tensor = _tensor(path, name, held, records)
    assert isinstance(tensor.data, Span | Strided)
    return replace(tensor, data=replace(tensor.data, begin=tensor.data.begin + begin))


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[None]:
    """Turn what goes wrong while an archive's list of records is read into CheckpointError."""
    with readable(path):
        try:
            yield
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, NotImplementedError):
            raise CheckpointError(f"{path}: truncated or damaged: its zip archive cannot be read. {AGAIN}") from None


def _records(path: Path, file: BinaryIO) -> dict[int, int]:
    """The archive's records: the byte that each begins at -> its length."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(4)
    if first != b"PK\3\4":
        raise CheckpointError(_not_a_zip(path, first))
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
        _check_kind(path, archive)
    records = {}
    for record in found:
        if record.flag_bits & 1 or record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: its record {record.filename} is compressed or encrypted, which torch.save never does. {AGAIN}"
            )
        file.seek(record.header_offset)
        signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        begin = record.header_offset + LOCAL_HEADER.size + name + extra
        if signature != b"PK\3\4" or record.file_size != record.compress_size or begin + record.file_size > size:
            raise CheckpointError(
                f"{path}: truncated or damaged: its record {record.filename} does not fit in it. {AGAIN}"
            )
        records[begin] = record.file_size
    return records


def _not_a_zip(path: Path, first: bytes) -> str:
    if first[:1] == b"\x80":
        return (
            f"{path}: is a plain pickle, the format of torch before 1.6. Load it with torch.load(..., weights_only=True) "
            "and save that with torch.save."
        )
    hint = ", but a note of git-lfs where one should be: run `git lfs pull`." if first == b"vers" else f". {AGAIN}"
    return f"{path}: is not a file of torch.save{hint}"


def _check_kind(path: Path, archive: zipfile.ZipFile) -> None:
    found = archive.namelist()
    # torch finds a record in any case, and the first of two: what is checked here must be what it reads.
    names = {name.partition("/")[2].lower(): name for name in found}
    if len(names) != len(found) or len({name.partition("/")[0] for name in found}) > 1:
        raise CheckpointError(
            f"{path}: has two records of one name, or two folders, which torch.save never does. {AGAIN}"
        )
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: is a TorchScript program. Save the model's state_dict() instead, with torch.save."
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: is a zip archive, but not one of torch.save. {AGAIN}")
    if archive.getinfo(names["data.pkl"]).file_size > MAX_PICKLE:
        raise CheckpointError(f"{path}: its pickle is larger than {MAX_PICKLE:,} bytes, so it holds more than weights.")
    order = names.get("byteorder")
    if order:  # a process would crash where torch swaps the bytes of numbers that it has not read
        with archive.open(order) as record:
            if record.read(10) != b"little":
                raise CheckpointError(f"{path}: was saved on a big-endian machine. Save it again on another.")


def _load(path: Path, part: BinaryIO | None = None) -> Any:
    """The content of the file, or of a part of it, its tensors without numbers."""
    import torch

    with warnings.catch_warnings(), _without_numbers():
        warnings.simplefilter("ignore")
        try:
            return torch.load(part or path, weights_only=True, mmap=part is None, map_location="meta")
        except pickle.UnpicklingError as error:
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code is None:
                raise CheckpointError(f"{path}: its pickle is damaged or would run code; refused. {SAFER}") from None
            raise CheckpointError(
                f"{path}: would run code ({code[1]}) when it is loaded, as a state dict never does; refused. {SAFER}"
            ) from None
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: holds a quantized or nested tensor, which surgery does not read. Save it as plain "
                "floating-point numbers."
            ) from None
        except Exception as error:  # a damaged pickle may make torch raise anything
            raise CheckpointError(f"{path}: torch.load cannot read it ({type(error).__name__}). {AGAIN}") from None


def _without_numbers() -> contextlib.AbstractContextManager[Any]:
    """Before 2.11, loading to the meta device read the numbers and did not say where they lie; fake tensors, slower, do."""
    import torch

    if torch.__version__ >= "2.11":
        return contextlib.nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _state_dict(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    nested = [found for key in NESTED if isinstance(loaded, Mapping) and (found := _tensors(loaded.get(key)))]
    if len(nested) > 1:
        raise CheckpointError(f"{path}: holds more than one state dict. Save the one that you mean by itself.")
    found = nested[0] if nested else _tensors(loaded)
    if not found:
        raise CheckpointError(f"{path}: holds no state dict. Save the model's state_dict() with torch.save.")
    for name in found:
        # What JSON can hold: a safetensors file is to have it.
        if name == "__metadata__" or (not name.isascii() and name != name.encode(errors="replace").decode()):
            raise CheckpointError(
                f"{path}: has a tensor named {name!a}, which no safetensors file can have. Rename it."
            )
    return found


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(value, Mapping):
        return {}
    return {name: held for name, held in value.items() if isinstance(name, str) and isinstance(held, torch.Tensor)}


def _tensor(path: Path, name: str, tensor: torch.Tensor, records: Mapping[int, int]) -> Tensor:
    import torch

    dtype, shape = DTYPES.get(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape)
    lazy = ", not yet negated or conjugated" if tensor.is_conj() or tensor.is_neg() else ""
    if tensor.layout != torch.strided or tensor.is_quantized or lazy or dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name} is stored as {tensor.dtype}, {tensor.layout}{lazy}, which surgery does not read. Save it as "
            "plain floating-point numbers."
        )
    itemsize = BITS[dtype] // 8
    if tensor.numel() == 0:
        return Tensor(name, dtype, shape, Span(path, 0))
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise CheckpointError(
            f"{path}: tensor {name} has no numbers in the file, or torch is older than 2.7. Update torch."
        )
    first, strides = tensor.storage_offset(), tensor.stride()
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (last + 1) * itemsize > records.get(begin, 0):
        raise CheckpointError(
            f"{path}: tensor {name} reaches beyond the record of the archive that should hold it: the file is damaged. {AGAIN}"
        )
    begin += first * itemsize
    if tensor.is_contiguous():
        return Tensor(name, dtype, shape, Span(path, begin))
    return Tensor(name, dtype, shape, Strided(path, begin, itemsize, shape, strides))


@dataclass(frozen=True, slots=True)
class Strided:
    """Entries that do not lie in a file in the order of the tensor: a transposed matrix, columns of a larger one.

    Attributes:
        begin: the byte of the first entry.
        itemsize: bytes of an entry.
        strides: entries from one index of a dimension to the next.
    """

    path: Path
    begin: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def open(self) -> Handle:
        return OpenStrided(self, open_file(self.path, buffering=0))


class OpenStrided:
    """A file whose entries are gathered, at most `GATHERED` at a time."""

    def __init__(self, data: Strided, file: BinaryIO) -> None:
        self.data, self.file = data, file

    def read(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            first, skip = divmod(offset + done, self.data.itemsize)
            count = min(GATHERED, -(-(skip + len(view) - done) // self.data.itemsize))
            part = memoryview(self._gather(first, count).view(np.uint8))[skip:][: len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def _gather(self, first: int, count: int) -> NDArray[np.void]:
        """Entries [first, first + count) in the tensor's order.

        Whatever their order, entries that are neighbours in the file are read at once.
        """
        data = self.data
        index = np.unravel_index(np.arange(first, first + count), data.shape)
        places = np.zeros(count, np.int64)
        for along, stride in zip(index, data.strides, strict=True):
            places += along * stride
        places, back = np.unique(places, return_inverse=True)
        held = np.empty(len(places), f"V{data.itemsize}")
        view = memoryview(held.view(np.uint8))
        ends = [*np.flatnonzero(np.diff(places) != 1) + 1, len(places)]
        start = 0
        for end in ends:
            self.file.seek(data.begin + int(places[start]) * data.itemsize)
            read_into(self.file, view[start * data.itemsize : end * data.itemsize])
            start = end
        return held[back]

    def close(self) -> None:
        self.file.close()


def _find(names: Collection[str]) -> Choice | None:
    if SINGLE in names:
        return Choice(NAME, (SINGLE,))
    if INDEX in names:
        return Choice(NAME, (), INDEX)
    for ending in ENDINGS:
        loose = [name for name in top_level(names, (ending,)) if not NO_WEIGHTS.fullmatch(name)]
        if len(loose) == 1:
            return Choice(NAME, (loose[0],))
        if loose:
            try:
                note = f"There is no index: {len(loose)} numbered files were read as one model."
                return Choice(NAME, numbered_set(loose), notes=(note,))
            except Unclear as unclear:
                raise Unclear(
                    f"{len(loose)} {ending} files, {unclear}. Give the one you mean by its own path."
                ) from None
    return None


def _open(folder: Path, choice: Choice, _: Base | None) -> Opened:
    choice = (stale_index(folder, choice, ".bin") if choice.index else None) or choice
    weight_map, _metadata = read_index(folder, choice, ".bin") if choice.index else ({}, None)
    files = {name: folder / name for name in sorted(set(weight_map.values()) or set(choice.files))}
    tensors = join(folder, choice, {name: read(path) for name, path in files.items()}, weight_map)
    return Opened(tensors, files, notes=choice.notes)


FORMAT = Format(NAME, _find, _open, ENDINGS)
