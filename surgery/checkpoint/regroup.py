"""Projections that one side stores together and the other apart: experts stacked or one by one, q, k and v in one matrix.

Each tensor is cut into the smallest parts that either side may store by itself: the gate, up or down projection of an
expert, one head of q, k or v. From pre's parts each tensor of ft gets its base, in ft's form, read straight out of pre's
files. Parts are ranges of rows, so nothing is copied; only experts that are stored transposed (gpt-oss, Llama 4, Qwen3-VL)
and GPT-2's projections are turned in memory, one at a time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.tensor import Computed, Handle, Sink, Tensor, read_bytes
from surgery.errors import PairError
from surgery.layout import Projections, projections

# module, kind, role, expert (-1 in a dense layer), head (-1 outside attention)
Key = tuple[str, str, str, int, int]

# Models whose stacked experts are stored [in, out].
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
# Of these, those in which the gate's and the up projection's outputs alternate.
ALTERNATING = ("gpt_oss",)
# How q, k and v lie in one tensor whose name does not tell: one behind the other, or each head or group of heads with its own.
GROUPS = {
    **dict.fromkeys(("gpt2", "qwen", "mpt", "dbrx", "modernbert", "nomic_bert", "baichuan", "chatglm"), "together"),
    **dict.fromkeys(("gpt_neox", "bloom", "persimmon"), "head"),
    "internlm2": "group",
}
# Of these, those in which it is stored [in, out].
CONV1D = ("gpt2",)
# Models whose qkv_proj is laid for a cluster that they were trained on.
SCATTERED = ("codegen",)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How projections lie in a tensor, by config.json; 0 for a number that it does not state."""

    model: str = ""
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    groups: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read a configuration, that of the text model where it has one."""
        inner = config.get("text_config")
        part = inner if isinstance(inner, Mapping) else config

        def number(*names: str) -> int:
            return next((part[name] for name in names if isinstance(part.get(name), int)), 0)

        model = str(part.get("model_type") or config.get("model_type") or "")
        hidden = number("hidden_size", "n_embed", "n_embd", "d_model")
        heads = number("num_attention_heads", "n_head", "n_heads")
        kv_heads = number("num_key_value_heads", "num_kv_heads") or heads
        groups = GROUPS.get(model, "")
        if model == "falcon" and part.get("new_decoder_architecture"):
            groups = "group"
        elif model in ("falcon", "gpt_bigcode"):
            groups, kv_heads = ("together", 1) if part.get("multi_query", True) else ("head", heads)
        elif model == "chatglm":
            kv_heads = number("multi_query_group_num") if part.get("multi_query_attention") else heads
        elif model == "dbrx":
            attention = part.get("attn_config")
            found = attention.get("kv_n_heads") if isinstance(attention, Mapping) else None
            kv_heads = found if isinstance(found, int) else 0
        elif groups and groups != "group":
            kv_heads = heads
        dim = number("head_dim", "kv_channels") or (hidden // heads if heads else 0)
        return cls(model, hidden, heads, kv_heads, dim, groups)

    def heads_of(self, held: Projections) -> list[tuple[str, int]] | None:
        """The heads in a tensor's rows, in their order: (role, number); None where config.json does not say."""
        if not (self.heads and self.kv_heads and self.head_dim) or self.model in SCATTERED:
            return None
        count = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        if not held.mixed or self.groups == "together":
            return [(role, head) for role in held.roles for head in range(count[role])]
        if not self.groups:
            return None
        share = self.heads // self.kv_heads
        return [
            place
            for group in range(self.kv_heads)
            for place in (*(("q", group * share + query) for query in range(share)), ("k", group), ("v", group))
        ]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A part of a tensor that lies in one piece, with the parts that it holds.

    Attributes:
        source: the matrix [rows, columns] as it is stored, or a bias [rows].
        keys: its parts, each of the same number of rows.
        transposed: it is stored [columns, rows].
        alternating: the rows of its parts take turns.
    """

    source: Tensor
    keys: tuple[Key, ...]
    transposed: bool = False
    alternating: bool = False

    @property
    def plain(self) -> bool:
        return not (self.transposed or self.alternating)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one part, [rows, columns]."""
        rows, *rest = reversed(self.source.shape) if self.transposed else self.source.shape
        return (rows // len(self.keys), *rest)

    def parts(self) -> Iterable[tuple[Key, Tensor]]:
        """Each part as a tensor."""
        rows = self.shape[0]
        for number, key in enumerate(self.keys):
            if self.plain:
                yield key, self.source.rows(number * rows, (number + 1) * rows)
            else:
                nbytes = self.source.nbytes // len(self.keys)
                data = Computed(self.source.path, nbytes, _Turn(self, number))
                yield key, Tensor(self.source.name, self.source.dtype, self.shape, data)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Takes one part out of a matrix."""

    matrix: Matrix
    number: int

    def __call__(self, sink: Sink) -> None:
        stored = _words(self.matrix.source)
        logical = stored.T if self.matrix.transposed else stored
        count, rows = len(self.matrix.keys), self.matrix.shape[0]
        at = slice(self.number, None, count) if self.matrix.alternating else slice(self.number * rows, None)
        sink.write(0, np.ascontiguousarray(logical[at][:rows]))


@dataclass(frozen=True, slots=True)
class _Weave:
    """Puts parts together as a matrix that is transposed or whose parts take turns."""

    matrix: Matrix
    parts: tuple[Tensor, ...]

    def __call__(self, sink: Sink) -> None:
        pieces = [_words(part) for part in self.parts]
        logical = np.concatenate(pieces)
        if self.matrix.alternating:
            for number, piece in enumerate(pieces):
                logical[number :: len(pieces)] = piece
        sink.write(0, np.ascontiguousarray(logical.T if self.matrix.transposed else logical))


@dataclass(frozen=True, slots=True)
class Laid:
    """Tensors one behind the other."""

    parts: tuple[Tensor, ...]
    ends: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    def open(self) -> Handle:
        return OpenLaid(self)


class OpenLaid:
    """Tensors one behind the other, of which one is open at a time."""

    def __init__(self, data: Laid) -> None:
        self.data = data
        self.number, self.reader = 0, data.parts[0].open()

    def read(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            number = bisect_right(self.data.ends, offset + done)
            if number == len(self.data.parts):
                raise EOFError
            if number != self.number:
                self.reader.close()
                self.number, self.reader = number, self.data.parts[number].open()
            part = self.data.parts[number]
            begin = offset + done - (self.data.ends[number] - part.nbytes)
            done += self.reader.fill(begin, view[done : done + part.nbytes - begin])

    def close(self) -> None:
        self.reader.close()


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Bases for tensors of ft, made of pre's in another grouping.

    Attributes:
        base: by the name in ft.
        used: the tensors of pre that they are made of.
        note: what the user should know; "" where nothing was to be done.
    """

    base: dict[str, Tensor]
    used: set[str]
    note: str = ""


def regroup(
    pre: Iterable[Tensor], ft: Iterable[Tensor], pre_config: Mapping[str, Any], ft_config: Mapping[str, Any]
) -> Regrouped:
    """Make the bases of tensors of ft that pre stores together or apart.

    Args:
        pre, ft: the tensors that no tensor of the other side is called like. Only name, type and shape of ft's are looked at.
        pre_config, ft_config: the content of each side's config.json; empty where there is none.

    Raises:
        PairError: one side has a part that the other lacks.
    """
    found: dict[Key, tuple[Tensor, str]] = {}
    for tensor in pre:
        for matrix in _matrices(tensor, pre_config or ft_config) or ():
            for key, part in matrix.parts():
                found[key] = part, tensor.name
    base: dict[str, Tensor] = {}
    taken: set[Key] = set()
    used: set[str] = set()
    for tensor in ft:
        matrices = _matrices(tensor, ft_config or pre_config)
        if matrices is None:
            continue
        keys = [key for matrix in matrices for key in matrix.keys]
        missing = [key for key in keys if key not in found]
        if len(missing) == len(keys):
            continue
        if missing:
            raise PairError(
                f"{tensor.name} of {tensor.path} holds {_said(missing[0])}, which is nowhere in pre, though pre has others of "
                "its kind: pre is incomplete. Download or save it again."
            )
        made = _made(tensor, matrices, found)
        if made is not None:
            base[tensor.name] = made
            taken.update(keys)
            used.update(found[key][1] for key in keys)
    for key, (part, name) in found.items():
        if name in used and key not in taken:
            raise PairError(
                f"{name} of {part.path} holds {_said(key)}, which ft lacks, though it has others of its kind: ft is "
                "incomplete. Save it again in full."
            )
    if not base:
        return Regrouped(base, used)
    name = next(iter(base))
    first = base[name]
    note = (
        f"{name} and {len(base) - 1:,} more are stored otherwise in pre ({first.name}, …): paired part by part, and written "
        "as in ft."
    )
    return Regrouped({name: replace(made, name=name) for name, made in base.items()}, used, note)


def _made(tensor: Tensor, matrices: Sequence[Matrix], found: Mapping[Key, tuple[Tensor, str]]) -> Tensor | None:
    """A tensor of the shape of one in ft out of pre's parts; None where the parts' shapes or types are others."""
    pieces: list[Tensor] = []
    for matrix in matrices:
        parts = tuple(found[key][0] for key in matrix.keys)
        if any(part.shape != matrix.shape or part.dtype != parts[0].dtype for part in parts):
            return None
        if matrix.plain:
            pieces.extend(parts)
        else:
            nbytes = sum(part.nbytes for part in parts)
            data = Computed(parts[0].path, nbytes, _Weave(matrix, parts))
            pieces.append(Tensor(parts[0].name, parts[0].dtype, matrix.source.shape, data))
    if any(piece.dtype != pieces[0].dtype for piece in pieces):
        return None
    joined = _joined(pieces)
    if len(joined) == 1:
        return replace(joined[0], shape=tensor.shape)
    ends = tuple(accumulate(piece.nbytes for piece in joined))
    return Tensor(joined[0].name, joined[0].dtype, tensor.shape, Laid(tuple(joined), ends))


def _joined(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The same bytes in fewer tensors: neighbours in one file are one, of one dimension."""
    joined: list[Tensor] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.data is piece.data and last.start + last.nbytes == piece.start:
            joined[-1] = replace(last, shape=(last.entries + piece.entries,))
        else:
            joined.append(replace(piece, shape=(piece.entries,)))
    return joined


def _matrices(tensor: Tensor, config: Mapping[str, Any]) -> list[Matrix] | None:
    """The matrices of a tensor with their parts; None where it is none that is known, or config.json does not say how it lies."""
    held = projections(tensor.name)
    if held is None or BITS[tensor.dtype] % 8 or 0 in tensor.shape:
        return None
    sizes = Sizes.of(config)
    if len(tensor.shape) != (1 if held.kind == "bias" else 2) + held.stacked:
        return None
    if held.stacked:
        inner = [(e, replace(tensor.rows(e, e + 1), shape=tensor.shape[1:])) for e in range(tensor.shape[0])]
    else:
        inner = [(-1 if held.expert is None else held.expert, tensor)]
    turned = held.stacked and held.kind == "weight" and _is_transposed(tensor.shape[1:], held, sizes)
    alternating = len(held.roles) == 2 and sizes.model in ALTERNATING
    matrices = []
    for expert, source in inner:
        heads = [(role, -1) for role in held.roles]
        if held.roles[0] in "qkv":
            of = sizes.heads_of(held)
            turned = held.mixed and held.kind == "weight" and sizes.model in CONV1D
            if of is None or source.shape[turned] != len(of) * sizes.head_dim:
                return None
            # A matrix that is turned is read for each of its parts: no head of it is ever stored by itself.
            heads = of if sizes.model not in CONV1D else heads
        keys = tuple((held.module, held.kind, role, expert, head) for role, head in heads)
        matrix = Matrix(source, keys, turned, alternating)
        if math.prod(matrix.shape) * len(keys) != source.entries:
            return None
        matrices.append(matrix)
    return matrices


def _is_transposed(shape: tuple[int, ...], held: Projections, sizes: Sizes) -> bool:
    """Whether stacked experts [rows, columns] are stored [in, out]: the side of the model's width tells, else its kind."""
    into, out = (shape[0], shape[1]) if held.roles == ("down",) else (shape[1], shape[0])
    if sizes.hidden in shape and into != out:
        return out == sizes.hidden
    return sizes.model in TRANSPOSED


def _said(key: Key) -> str:
    module, kind, role, expert, head = key
    where = f"expert {expert} of {module}" if expert >= 0 else module
    return f"the {role} {kind}{f' of head {head}' if head >= 0 else ''} of {where}"


def _words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bits of a tensor that is small enough for memory."""
    return np.frombuffer(read_bytes(tensor), f"u{BITS[tensor.dtype] // 8}").reshape(tensor.shape)
