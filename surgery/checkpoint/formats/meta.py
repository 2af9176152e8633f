"""Meta's own Llama files: `params.json` and `consolidated.00.pth`, one file for each GPU that the model was cut for.

The tensors come out as transformers has them. Names are translated; the parts of a cut matrix are joined, by rows or by columns;
and the rows of wq and wk are put in another order, since Meta rotates entries 2i and 2i + 1 of a head, transformers i and
i + head_dim / 2 (as its `convert_llama_weights_to_hf.permute`). All of it happens while bytes are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.formats import pytorch
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened, Unclear
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Handle, Reader, Tensor
from surgery.errors import CheckpointError

EMBEDDING, NORM, HEAD = "tok_embeddings.weight", "norm.weight", "output.weight"
NAME, PARAMS = "meta", "params.json"
PART = re.compile(r"consolidated\.[0-9]{2}\.pth")
# Meta's own files, beside the Hugging Face ones of a Llama 3 repository.
ORIGINAL = "original/"
# name in a layer -> transformers' name, shape (D dim, K dim of keys, F of the feed-forward), and the dimension that it is cut
# along (None: every part has all of it)
LAYER: dict[str, tuple[str, str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", "DD", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", "KD", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", "KD", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", "DD", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", "FD", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", "FD", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", "DF", 1),
    "attention_norm.weight": ("input_layernorm.weight", "D", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D", None),
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
# Frequencies that a loader computes anew.
COMPUTED = re.compile(r"(.+\.)?rope\.freqs")

Parts = dict[Path, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Params:
    """The shapes that `params.json` states; `vocabulary` is -1 where it leaves that to the tokenizer."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


def read(params: Path, *parts: Path) -> dict[str, Tensor]:
    """Every tensor of a Llama 1, 2 or 3 model under transformers' names and in its order of rows, reading headers only.

    Args:
        params: params.json.
        parts: consolidated.00.pth and so on, in order.

    Raises:
        CheckpointError: a file cannot be read, a part or a tensor is missing, a shape is not what params.json says, or there is a
            tensor that such a model does not have.
    """
    wanted = _params(params)
    for number, path in enumerate(parts):
        if path.name != f"consolidated.{number:02d}.pth":
            missing = path.with_name(f"consolidated.{number:02d}.pth")
            raise CheckpointError(f"{missing}: is missing, while {path.name} is there. Download it again.")
    held = {path: _part(path, wanted) for path in parts}
    cut, width, head = len(parts), wanted.width, wanted.width // wanted.heads
    rows = _rows(_pieces(held, "layers.0.attention.wq.weight"))
    if rows * cut != width and rows and width % rows == 0:
        raise CheckpointError(
            f"{parts[0].parent}: holds {cut} of {width // rows} parts, as the rows of {parts[0].name} say. Download all of them, "
            "consolidated.00.pth and so on, and no other."
        )
    sizes = {
        "D": width,
        "K": wanted.kv_heads * head,
        "F": cut * _rows(_pieces(held, "layers.0.feed_forward.w1.weight")),
    }
    embedding = _pieces(held, EMBEDDING)
    # Llama 1 and 2 cut it by columns, Llama 3 by rows.
    along = 0 if embedding[0].shape[1:] == (width,) else 1
    vocabulary = wanted.vocabulary if wanted.vocabulary > 0 else _rows(embedding) * (1 if along else cut)
    found = [_join(embedding, "model.embed_tokens.weight", (vocabulary, width), along)]
    for layer in range(wanted.layers):
        for name, (theirs, letters, dimension) in LAYER.items():
            pieces = _pieces(held, f"layers.{layer}.{name}")
            shape = tuple(sizes[letter] for letter in letters)
            rotated = head if theirs.startswith(ROTATED) else 0
            found.append(_join(pieces, f"model.layers.{layer}.{theirs}", shape, dimension, rotated))
    found.append(_join(_pieces(held, NORM), "model.norm.weight", (width,), None))
    if any(HEAD in part for part in held.values()):
        found.append(_join(_pieces(held, HEAD), "lm_head.weight", (vocabulary, width), 0))
    return {tensor.name: tensor for tensor in found}


def _params(path: Path) -> Params:
    found = read_json(path)
    found = found["model"] if isinstance(found.get("model"), dict) else found
    width, layers, heads = (found.get(key, 0) for key in ("dim", "n_layers", "n_heads"))
    kv_heads = heads if found.get("n_kv_heads") is None else found["n_kv_heads"]
    params = Params(width, layers, heads, kv_heads, found.get("vocab_size", -1))
    if not all(type(number) is int and 0 < number < 1 << 31 for number in (width, layers, heads, kv_heads)) or (
        type(params.vocabulary) is not int
    ):
        raise CheckpointError(f"{path}: does not give dim, n_layers and n_heads of a Llama model. Download it again.")
    if params.width % (2 * params.heads) or params.heads % params.kv_heads:
        raise CheckpointError(f"{path}: dim, n_heads and n_kv_heads do not fit together. Download it again.")
    return params


def _part(path: Path, params: Params) -> dict[str, Tensor]:
    """The tensors of one file that make up the model."""
    part = {name: tensor for name, tensor in pytorch.read(path).items() if not COMPUTED.fullmatch(name)}
    for name in part:
        layer = re.fullmatch(r"layers\.([0-9]{1,9})\.(.+)", name)
        if name not in (EMBEDDING, NORM, HEAD) and not (layer and layer[2] in LAYER and int(layer[1]) < params.layers):
            raise CheckpointError(
                f"{path}: has {name}, which no Llama 1, 2 or 3 text model of {params.layers} layers has. Give the model in the "
                "Hugging Face format."
            )
    return part


def _rows(pieces: list[Tensor]) -> int:
    return pieces[0].shape[0] if pieces[0].shape else 0


def _pieces(parts: Parts, name: str) -> list[Tensor]:
    """A tensor's piece in each part."""
    for path, part in parts.items():
        if name not in part:
            raise CheckpointError(f"{path}: has no {name}. Download it again.")
    pieces = [part[name] for part in parts.values()]
    for piece in pieces:
        if (piece.dtype, piece.shape) != (pieces[0].dtype, pieces[0].shape):
            raise CheckpointError(
                f"{piece.path}: {name} is {piece.dtype} {list(piece.shape)}, in {pieces[0].path.name} {pieces[0].dtype} "
                f"{list(pieces[0].shape)}: not parts of one model. Download them again."
            )
    return pieces


def _join(pieces: list[Tensor], name: str, shape: tuple[int, ...], along: int | None, head: int = 0) -> Tensor:
    """The tensor of this shape whose pieces were cut along a dimension, None where each piece is all of it."""
    first = pieces[0]
    wanted = tuple(size // (len(pieces) if dimension == along else 1) for dimension, size in enumerate(shape))
    if first.shape != wanted or (along is not None and shape[along] % len(pieces)):
        raise CheckpointError(
            f"{first.path}: {first.name} has shape {list(first.shape)} where params.json makes it {list(wanted)}, in "
            f"{len(pieces)} parts. Download both again."
        )
    if along is None or (len(pieces) == 1 and not head):
        return replace(first, name=name)
    return Tensor(name, first.dtype, shape, Joined(tuple(pieces), along, head))


@dataclass(frozen=True, slots=True)
class Joined:
    """A matrix out of pieces [rows, columns].

    Attributes:
        along: the dimension that it was cut along.
        head: rows of an attention head whose order is to be changed; 0 where none is.
    """

    pieces: tuple[Tensor, ...]
    along: int
    head: int

    @property
    def path(self) -> Path:
        return self.pieces[0].path

    def open(self) -> Handle:
        return OpenJoined(self)

    def locate(self, offset: int) -> tuple[int, int, int]:
        """Where a byte of the matrix is: the piece, the byte in it, and how many bytes follow there in the matrix's order."""
        rows, size = self.pieces[0].shape[0], self.pieces[0].nbytes
        if self.along:
            row, rest = divmod(offset, size // rows * len(self.pieces))
            piece, rest = divmod(rest, size // rows)
            return piece, row * (size // rows) + rest, size // rows - rest
        row, rest = divmod(offset, size // rows)
        piece, row = divmod(self.source(row), rows)
        begin = row * (size // rows) + rest
        return piece, begin, (size // rows - rest) if self.head else size - begin

    def source(self, row: int) -> int:
        """The row of Meta's order that is this one of transformers': of a head's rows, first the even ones, then the odd."""
        if not self.head:
            return row
        row, rest = divmod(row, self.head)
        half, pair = divmod(rest, self.head // 2)
        return row * self.head + 2 * pair + half


class OpenJoined:
    """The pieces of a matrix, open."""

    def __init__(self, data: Joined) -> None:
        self.data = data
        self.readers: list[Reader] = []
        try:
            for piece in data.pieces:
                self.readers.append(piece.open())
        except CheckpointError:
            self.close()
            raise

    def read(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            piece, begin, length = self.data.locate(offset + done)
            part = view[done : done + length]
            self.readers[piece].fill(begin, part)
            done += len(part)

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def _find(names: Collection[str]) -> Choice | None:
    for folder in ("", ORIGINAL):
        parts = sorted(name for name in names if name.startswith(folder) and PART.fullmatch(name[len(folder) :]))
        if parts and folder + PARAMS in names:
            return Choice(NAME, (folder + PARAMS, *parts))
        if parts:
            raise Unclear(f"{parts[0]} but no {folder}{PARAMS}, which says how many heads the model has. Put it there.")
    return None


def _open(folder: Path, choice: Choice, _: Base | None) -> Opened:
    files = {name: folder / name for name in choice.files}
    return Opened(read(*files.values()), files)


FORMAT = Format(NAME, _find, _open, borrows=True)
