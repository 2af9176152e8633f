"""A GGUF file (llama.cpp, Ollama) as one side of a pair: Hugging Face names, numbers that are dequantized as they are read.

What llama.cpp's converter did to names and numbers is undone: names by the gguf package's own tables, from the names of the other
side; rows that were reordered for its rotary embedding are gathered; the one that was added to norms is taken off. Tensors that
are stored as F32, F16 or BF16 keep their type; quantized ones are float32, and so is what is written where such a file is ft.
What quantizing rounded off is lost: the difference to the other side has that rounding in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear, top_level
from surgery.checkpoint.formats.gguf_header import Header, Stored, read_header
from surgery.checkpoint.readable import open_file
from surgery.checkpoint.tensor import Data, Handle, Span, Tensor, read_into
from surgery.errors import CheckpointError

# What the converter does to each architecture's numbers; all but gemma, which it does not read, as transformers undoes it.
AS_THEY_ARE = ("phi3", "qwen2", "qwen3", "starcoder2")
HEADS_INTERLEAVED = ("llama",)  # Mistral too: it has no architecture of its own
QKV_SPLIT = ("bloom",)
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
TRANSPOSED = ("gpt2",)
ARCHITECTURES = sorted(AS_THEY_ARE + HEADS_INTERLEAVED + QKV_SPLIT + NORMS_PLUS_ONE + TRANSPOSED)
CONV1D = re.compile(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight")
EXPERTS = re.compile(r"\.ffn_\w+_exps\.|\.ffn_\w+\.\d+\.")
# Tables of the rotary embedding: no weights.
BUFFERS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")
RAW = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
LAYER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
# Entries that are dequantized at once: what is made of them on the way stays in the cache.
PIECE = 1 << 15
# Of a transposed matrix more at once: a block of the file goes into many rows, and is dequantized again for the next ones.
STRIPE = 1 << 18

Rows = NDArray[np.int64]
Values = NDArray[Any]


NAME = "gguf"


def read(path: Path, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a GGUF file, under the names that the other side of the pair has for them.

    Args:
        path: one whole file; a split model is refused.
        other: the tensors of the other side, with Hugging Face names.

    Raises:
        CheckpointError: the file cannot be read or is damaged, the model's architecture or a quantization type is not
            supported, or the gguf package is missing.
    """
    header = read_header(path)
    architecture = _architecture(path, header)
    tensors: dict[str, Tensor] = {}
    names = _names(architecture, other)
    for stored in header.tensors:
        if BUFFERS.fullmatch(stored.name):
            continue
        name = _name(names, stored.name)
        if name in tensors:
            raise CheckpointError(f"{path}: holds {name} twice, the second as {stored.name}. Convert the model again.")
        tensors[name] = _tensor(path, name, stored, architecture, header.metadata)
    return tensors


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A tensor whose numbers are dequantized, reordered or shifted on the way.

    Attributes:
        order: of a tensor [rows, columns] or [rows], the row of the file that each row is; None where they are in order.
        transposed: the file holds the transpose of the matrix.
        shift: what is added to each entry.
        raw: the type of the entries as they are handed out: the stored bits of unquantized ones, or float32.
    """

    path: Path
    stored: Stored
    order: Rows | None = None
    transposed: bool = False
    shift: float = 0.0
    raw: type[Any] = np.float32

    def open(self) -> Handle:
        return OpenBlocks(self, open_file(self.path, buffering=0))


class OpenBlocks:
    """Blocks, while their file is open."""

    def __init__(self, data: Blocks, file: BinaryIO) -> None:
        self.data, self.file = data, file

    def read(self, offset: int, view: memoryview) -> None:
        itemsize, done = np.dtype(self.data.raw).itemsize, 0
        with np.errstate(all="ignore"):
            while done < len(view):
                first, cut = divmod(offset + done, itemsize)
                last = -(-(offset + len(view)) // itemsize)
                values = np.ascontiguousarray(self._values(first, last - first)).view(np.uint8)
                part = values[cut : cut + len(view) - done]
                view[done : done + len(part)] = memoryview(part)
                done += len(part)

    def close(self) -> None:
        self.file.close()

    def _values(self, first: int, count: int) -> Values:
        """The entries from `first` on, of which there are at least `count` and some are enough, [entries]."""
        transposed = self.data.transposed
        values = self._columns(first, min(count, STRIPE)) if transposed else self._rows(first, min(count, PIECE))
        return values + self.data.raw(self.data.shift) if self.data.shift else values

    def _rows(self, first: int, count: int) -> Values:
        order, shape, block = self.data.order, self.data.stored.shape, self.data.stored.block
        if order is None:
            return self._load([(first, count)])[first % block :][:count]
        width = math.prod(shape[1:])
        row, column = divmod(first, width)
        rows = order[row : -(-(first + count) // width)]
        # A row is a whole number of blocks, so only the first can begin within one.
        runs = [(int(rows[0]) * width + column, min(count, width - column))]
        runs += [(int(source) * width, width) for source in rows[1:]]
        return self._load(runs)[column % block :][:count]

    def _columns(self, first: int, count: int) -> Values:
        """Columns of the file's matrix, which are rows of the tensor: whole ones, or a part of one."""
        (height, width), block = self.data.stored.shape, self.data.stored.block
        column, row = divmod(first, height)
        if row or count < height:
            columns, rows = 1, min(count, height - row)
        else:
            columns, rows = count // height, height
        loaded = self._load([(source * width + column, columns) for source in range(row, row + rows)])
        cut = column % block
        return loaded.reshape(rows, -1)[:, cut : cut + columns].T.ravel()

    def _load(self, runs: Sequence[tuple[int, int]]) -> Values:
        """The blocks that hold the runs (first, count) of the file's entries, [entries]."""
        stored = self.data.stored
        spans = [(first // stored.block, -(-(first + count) // stored.block)) for first, count in runs]
        held = memoryview(bytearray(sum(end - begin for begin, end in spans) * stored.block_bytes))
        at = 0
        for begin, end in spans:
            size = (end - begin) * stored.block_bytes
            self.file.seek(stored.begin + begin * stored.block_bytes)
            read_into(self.file, held[at : at + size])
            at += size
        codes = np.frombuffer(held, np.uint8)
        return codes.view(self.data.raw) if self.data.raw is not np.float32 else _dequantize(stored.type, codes)


def _dequantize(kind: str, codes: NDArray[np.uint8]) -> Values:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(codes, GGMLQuantizationType[kind])


def _architecture(path: Path, header: Header) -> str:
    architecture, parts = header.metadata.get("general.architecture"), header.metadata.get("split.count")
    if parts not in (None, 0, 1):
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model. Join them with llama.cpp's `llama-gguf-split --merge` and give "
            "the result."
        )
    if header.metadata.get("general.type", "model") != "model":
        raise CheckpointError(
            f"{path}: is no model but of the type {header.metadata['general.type']}. Give a GGUF file of a whole model."
        )
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: surgery reads no GGUF of the architecture {architecture}, only {', '.join(ARCHITECTURES)}. Give the model "
            "in the Hugging Face format."
        )
    expert = next((stored.name for stored in header.tensors if EXPERTS.search(stored.name)), None)
    if expert:
        raise CheckpointError(
            f"{path}: {expert} is a mixture of experts, whose GGUF surgery does not read. Give the model in the Hugging "
            "Face format."
        )
    return str(architecture)


def _names(architecture: str, other: Mapping[str, Tensor]) -> dict[str, str]:
    """GGUF names -> the other side's, both with the number of a layer as 0."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    table = get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), 1)
    names: dict[str, str] = {}
    for name in other:
        stem, ending = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
        plain = LAYER.sub("0", stem, count=1).replace("language_model.", "")
        # The other side may be saved without its head, and so without a prefix; Bloom's table has none.
        for spelled in (plain, f"model.{plain}", plain.removeprefix("transformer.")):
            if found := table.get_name(spelled):
                names.setdefault(found + ending, LAYER.sub("0", name, count=1))
                break
    return names


def _name(names: Mapping[str, str], stored: str) -> str:
    """The Hugging Face name of a tensor: as its like is called in other layers; its own where the other side has none."""
    layer = LAYER.search(stored)
    found = names.get(LAYER.sub("0", stored, count=1), "lm_head.weight" if stored == "output.weight" else stored)
    return LAYER.sub(layer.group(), found, count=1) if layer else found


def _tensor(path: Path, name: str, stored: Stored, architecture: str, metadata: Mapping[str, Any]) -> Tensor:
    order, shape, shift = None, stored.shape, 0.0
    transposed = architecture in TRANSPOSED and CONV1D.fullmatch(stored.name) is not None and len(shape) == 2
    if transposed:
        shape = shape[::-1]
    if architecture in NORMS_PLUS_ONE and stored.name.endswith("norm.weight"):
        shift = -1.0
    if architecture in HEADS_INTERLEAVED and re.search(r"\.attn_[qk]\.", stored.name):
        heads = _heads(path, architecture, metadata, key=".attn_k." in stored.name)
        order = _order(path, stored, (heads, -1, 2), (0, 2, 1))
    elif architecture in QKV_SPLIT and ".attn_qkv." in stored.name:
        order = _order(path, stored, (3, _heads(path, architecture, metadata, key=False), -1), (1, 0, 2))
    if stored.type in PLAIN and order is None and not transposed and not shift:
        return Tensor(name, stored.type, shape, Span(path, stored.begin))
    if stored.type in RAW and not shift:
        data: Data = Blocks(path, stored, order, transposed, raw=RAW[stored.type])
        return Tensor(name, stored.type, shape, data)
    try:
        _dequantize(stored.type, np.zeros(stored.block_bytes, np.uint8))
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: the gguf package cannot dequantize {stored.type}, the type of tensor {stored.name}. Update it, or give the "
            "model in another quantization."
        ) from None
    return Tensor(name, "F32", shape, Blocks(path, stored, order, transposed, shift))


def _heads(path: Path, architecture: str, metadata: Mapping[str, Any], *, key: bool) -> int:
    heads = metadata.get(f"{architecture}.attention.head_count")
    if key:
        heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if type(heads) is not int or heads < 1:
        raise CheckpointError(
            f"{path}: the metadata gives no number of attention heads, without which its rows cannot be put in order. Convert "
            "the model again."
        )
    return heads


def _order(path: Path, stored: Stored, cut: tuple[int, ...], axes: tuple[int, ...]) -> Rows:
    """The row of the file that each row of the tensor is: the rows cut into three axes, which change places."""
    rows = stored.shape[0] if stored.shape else 1
    if rows % -math.prod(cut):
        raise CheckpointError(
            f"{path}: tensor {stored.name} of shape {list(stored.shape)} does not fit the number of heads in the metadata: the "
            "file is damaged. Convert the model again."
        )
    return np.arange(rows).reshape(cut).transpose(axes).ravel()


def _find(names: Collection[str]) -> Choice | None:
    loose = top_level(names, (".gguf",))
    if len(loose) > 1:
        raise Unclear(f"{len(loose)} .gguf files. Give the one you mean by its own path.")
    return Choice(NAME, (loose[0],)) if loose else None


def _open(folder: Path, choice: Choice, base: Base | None) -> Opened:
    if base is None:
        raise CheckpointError(f"{folder}: can only be read beside the model that it was made from.")
    path = folder / choice.files[0]
    return Opened(read(path, base.tensors), {choice.files[0]: path})


FORMAT = Format(NAME, _find, _open, (".gguf",), borrows=True, needs_base=True)
