"""A LoRA adapter as peft writes it: adapter_config.json beside adapter_model.safetensors or .bin, added to its base on reading.

    ft = pre + s · B·A          (Hu et al., "LoRA", arXiv 2106.09685, Eq. 3)

with A [r, in], B [out, r], s = α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732). It is rounded as by peft's
`merge_and_unload` on a CPU: B·A and its product with s are float32, and the sum is rounded once to the type of pre.

BLAS does not promise that the bits of an entry of B·A do not depend on which others are asked for with it. So an entry is summed
here, over r in order, by fused multiply-adds; a BLAS that keeps this order gives the same bits. A step is done in float64, where
the product is exact; that rounds twice, which is seldom another number than that of a true fused step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import RAW, Floats, narrow, widen
from surgery.checkpoint.formats import safetensors
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Handle, Tensor
from surgery.errors import CheckpointError
from surgery.layout import align, place

NAME, CONFIG, WEIGHTS = "adapter", "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# A whole model beside an adapter: transformers loads it and puts the adapter on.
WHOLE = (safetensors.SINGLE, safetensors.INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "base_model.model."
# peft names the adapter in a model's own state dict ("lora_A.default.weight"), and leaves the name out where it saves.
FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.(?P<name>\w+))?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.(?P<other>\w+))?)"
)
NO_LORA = re.compile(r"\.lora_|\.trainable_tokens_|\.modules_to_save\.|\.original_module\.")
# Of a vocabulary with more rows peft stores the saved modules twice more, under its wrapper's names.
COPY = re.compile(r"\.(modules_to_save|original_module)\.")
# Those that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga, ...) train beside a changed one.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
Read = Callable[[Path, Path, Mapping[str, Tensor]], dict[str, Tensor]]
# Settings with which the fine-tuned model is more than base + s · B·A, or is no model of the base's shape.
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
)
MERGE = "Merge it with peft's merge_and_unload, save that, and give its folder."
# Entries that are worked on at once: the float64 product and the float32 sum stay in a core's cache.
BLOCK = 1 << 14


def read(config: Path, weights: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the fine-tuned model, in the order and under the names of the base's.

    What the adapter does not touch is the base's own `Tensor`.

    Args:
        config: adapter_config.json.
        weights: adapter_model.safetensors or adapter_model.bin.
        base: the tensors of the model that it was made for.

    Raises:
        CheckpointError: not a plain LoRA adapter, damaged, or made for another model.
    """
    settings = _Settings(config, read_json(config))
    stored = _stored(weights)
    factors, whole = _sort(weights, stored)
    if not factors and not whole:
        raise CheckpointError(f"{weights}: holds no tensor. Save the adapter again.")
    names, _ = align(base, [*(f"{module}.weight" for module in factors), *whole])
    tied = not any(place(name).category == "head" and len(tensor.shape) == 2 for name, tensor in base.items())
    tuned = dict(base)
    for key in _replacing(weights, settings, whole, names, tied=tied):
        tuned[names[key]] = replaced(weights, whole[key], base[names[key]])
    conv1d = _has_conv1d(base)
    for module, pair in factors.items():
        if f"{module}.weight" not in names:
            raise no_base(weights, f"{module}.weight")
        before = tuned[names[f"{module}.weight"]]
        data = Computed(weights, before, before.dtype, _update(weights, settings, module, pair, before, conv1d=conv1d))
        tuned[before.name] = replace(before, data=data, start=0)
    return tuned


class _Settings:
    """What adapter_config.json says, checked."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        if values.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: is an adapter of type {values.get('peft_type')}, not LORA. {MERGE}")
        if values.get("init_lora_weights", True) not in INITS:
            raise CheckpointError(
                f"{path}: was begun by {values['init_lora_weights']}, which changes the base too. {MERGE}"
            )
        if variant := next((key for key in VARIANTS if values.get(key)), None):
            raise CheckpointError(f"{path}: sets {variant}, which is more than LoRA. {MERGE}")
        self.tied = bool(values.get("ensure_weight_tying"))
        self.saved = values.get("modules_to_save") or []
        if not isinstance(self.saved, list) or not all(isinstance(name, str) for name in self.saved):
            raise self._damaged("modules_to_save")

    def rank(self, module: str) -> int:
        rank = self._number("r", "rank_pattern", module)
        if rank < 1 or rank != int(rank):
            raise self._damaged("r")
        return int(rank)

    def scale(self, module: str) -> float:
        """s: α/r or α/√r."""
        alpha, rank = self._number("lora_alpha", "alpha_pattern", module), self.rank(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _number(self, default: str, patterns: str, module: str) -> float:
        """The value of the first pattern that matches the module's name, or its end: peft's own rule."""
        found, table = self.values.get(default), self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise self._damaged(patterns)
        for pattern, value in table.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    found = value
                    break
            except re.error:
                raise self._damaged(patterns) from None
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1 << 53:
            raise self._damaged(default)
        return found

    def _damaged(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is missing or damaged. Save the adapter again.")


def _stored(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        return read_header(weights).tensors
    from surgery.checkpoint.formats import pytorch

    return pytorch.read(weights)


def _sort(weights: Path, stored: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors of each module by kind ("A" and "B", or "embedding A" and "embedding B"), and the tensors stored as a whole."""
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(name):
            kind = match["linear"] or f"embedding {match['embedding']}"
            pair = factors.setdefault(match["module"], {})
            if kind in pair:
                raise CheckpointError(
                    f"{weights}: holds several adapters ({match['name'] or match['other']} and another). Save the one you mean."
                )
            pair[kind] = tensor
        elif COPY.search(name) and COPY.sub(".", key) in stored:
            continue
        elif NO_LORA.search(name):
            raise CheckpointError(f"{weights}: {key} is no part of plain LoRA. {MERGE}")
        else:  # modules_to_save, trained biases, an embedding with more rows, or the copy of one that LoRA was added to
            whole[name.replace(".base_layer.", ".")] = tensor
    return factors, whole


def _replacing(
    weights: Path, settings: _Settings, whole: Mapping[str, Tensor], names: Mapping[str, str], *, tied: bool
) -> Iterator[str]:
    """The tensors that take the place of one of the base.

    Args:
        tied: the base stores no head, so it may be tied to the embedding. What would part the two is refused, since the base's
            config.json, which the output gets, ties them.
    """
    embedding = any(place(key).category == "embedding" for key in whole)
    for key in whole:
        category = place(key).category
        apart = key.rpartition(".")[0].endswith(tuple(settings.saved)) and not settings.tied
        if key not in names:
            if not (tied and category == "head" and embedding and not apart):
                raise no_base(weights, key)
        elif tied and category == "embedding" and apart:
            raise CheckpointError(
                f"{weights}: {key} was trained apart from the head, which the base does not store and may tie to it. {MERGE}"
            )
        else:
            yield key


def replaced(weights: Path, tensor: Tensor, before: Tensor) -> Tensor:
    """What the adapter stores as a whole, in the base's type."""
    if tensor.dtype == before.dtype:
        return replace(tensor, name=before.name)
    if not (tensor.is_float and before.is_float):
        raise CheckpointError(f"{weights}: {tensor.name} is {tensor.dtype}, where the base has {before.dtype}. {MERGE}")
    return Tensor(before.name, before.dtype, tensor.shape, Computed(weights, tensor, before.dtype, None))


def no_base(weights: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{weights}: changes {key}, which the base does not store. Give the base that it was made for, or, where the base ties "
        "or fuses this weight, merge with peft's merge_and_unload and give the folder of that."
    )


def _has_conv1d(base: Mapping[str, Tensor]) -> bool:
    """Whether the layers hold their weights as [in, out], like GPT-2: there a bias is as long as dimension 1.

    The setting fan_in_fan_out does not tell: peft goes by the kind of each module, and saves what the last one was.
    """
    for name, tensor in base.items():
        bias = base.get(f"{name.removesuffix('weight')}bias")
        if bias and len(tensor.shape) == 2 and bias.shape == tensor.shape[1:] != tensor.shape[:1]:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Update:
    """s · B·A, or its transpose.

    Attributes:
        a, b: A [r, in] and B [out, r].
        transposed: the tensor is [in, out].
        twice: rounded to the tensor's type before it is added, as peft does with an embedding.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    twice: bool


def _update(
    weights: Path, settings: _Settings, module: str, pair: Mapping[str, Tensor], before: Tensor, *, conv1d: bool
) -> Update:
    embedding = "embedding A" in pair
    kinds = ("embedding A", "embedding B") if embedding else ("A", "B")
    if pair.keys() != set(kinds):
        raise CheckpointError(f"{weights}: {module} has no pair of A and B. Save the adapter again.")
    a, b = (pair[kind] for kind in kinds)
    if not before.is_float:
        raise CheckpointError(
            f"{before.path}: {before.name} is quantized ({before.dtype}), so nothing can be added to it. Dequantize the base to "
            "bfloat16 first."
        )
    if len(before.shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2 or not (a.is_float and b.is_float):
        raise CheckpointError(f"{weights}: {module} is no linear layer or embedding of floating-point numbers. {MERGE}")
    rank = settings.rank(module)
    if not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(
            f"{weights}: {module} has A of rank {a.shape[0]} and B of rank {b.shape[1]}, where {settings.path.name} says {rank}. "
            "Save the adapter again."
        )
    sizes = (b.shape[0], a.shape[1])
    square = sizes[0] == sizes[1] and conv1d and place(before.name).layer is not None
    transposed = embedding or square or sizes != before.shape
    if before.shape != (sizes[::-1] if transposed else sizes):
        raise CheckpointError(
            f"{weights}: {module} fits a weight of shape {list(sizes)}, where the base has {list(before.shape)}. Give the base "
            "that it was made for as `pre`."
        )
    return Update(a, b, settings.scale(module), transposed, twice=embedding)


@dataclass(frozen=True, slots=True)
class Computed:
    """The numbers of a tensor, cast to a type, and an update added to them."""

    path: Path
    before: Tensor
    dtype: str
    update: Update | None

    def open(self) -> Handle:
        return OpenComputed(self)


class OpenComputed:
    """Factors in memory, and the tensor that they are added to opened for reading.

    Attributes:
        left, right: the update is s · left·right; left [rows, r] float32, right [r, columns] float64.
    """

    def __init__(self, data: Computed) -> None:
        self.data = data
        if data.update:
            a, b = _load(data.update.a), _load(data.update.b)
            self.left, right = (a.T, b.T) if data.update.transposed else (b, a)
            self.right = right.astype(np.float64, order="C")
        self.source = data.before.open()

    def close(self) -> None:
        self.source.close()

    def read(self, offset: int, view: memoryview) -> None:
        size = RAW[self.data.dtype].itemsize
        first, last = offset // size, -(-(offset + len(view)) // size)
        if (last - first) * size != len(view):  # not whole entries
            entries = memoryview(bytearray((last - first) * size))
            self.read(first * size, entries)
            view[:] = entries[offset - first * size :][: len(view)]
            return
        raw = np.frombuffer(view, RAW[self.data.dtype])
        with np.errstate(all="ignore"):
            self._read_before(first, raw)
            if self.data.update:
                for start in range(0, len(raw), BLOCK):
                    self._add(self.data.update, first + start, raw[start : start + BLOCK])

    def _read_before(self, first: int, out: NDArray[Any]) -> None:
        """Fill `out` with the entries from `first` on, as they are without the update."""
        before = self.data.before
        if before.dtype == self.data.dtype:
            self.source.fill(first * out.itemsize, memoryview(out.view(np.uint8)))
            return
        raw = np.empty(BLOCK, RAW[before.dtype])
        for start in range(0, len(out), BLOCK):
            part = raw[: len(out) - start]
            self.source.fill((first + start) * raw.itemsize, memoryview(part.view(np.uint8)))
            out[start : start + BLOCK] = narrow(widen(before.dtype, part), self.data.dtype)

    def _add(self, update: Update, start: int, out: NDArray[Any]) -> None:
        dtype, delta = self.data.dtype, np.empty(len(out), np.float32)
        for begin, row, rows, column, columns in _rectangles(start, len(out), self.right.shape[1]):
            product = _product(self.left[row : row + rows], self.right[:, column : column + columns])
            delta[begin : begin + rows * columns] = product.reshape(-1)
        delta *= np.float32(update.scale)
        added = widen(dtype, narrow(delta, dtype)) if update.twice else delta
        out[:] = narrow(widen(dtype, out) + added, dtype)


def _load(tensor: Tensor) -> Floats:
    """A factor in float32, in which peft keeps it."""
    raw = np.empty(tensor.entries, RAW[tensor.dtype])
    with tensor.open() as reader:
        reader.fill(0, memoryview(raw.view(np.uint8)))
    return widen(tensor.dtype, raw).astype(np.float32).reshape(tensor.shape)


def _rectangles(start: int, count: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut a run of a matrix's entries into whole rows and parts of rows: (place in the run, row, rows, column, columns)."""
    begin = 0
    while begin < count:
        row, column = divmod(start + begin, width)
        rows = 1 if column else max((count - begin) // width, 1)
        columns = min(width - column, count - begin)
        yield begin, row, rows, column, columns
        begin += rows * columns


def _product(left: Floats, right: NDArray[np.float64]) -> Floats:
    """left [rows, r] · right [r, columns], each entry summed in float32 by fused multiply-adds in the order of r."""
    factors = left.astype(np.float64)
    total = np.zeros((len(left), right.shape[1]), np.float32)
    product = np.empty(total.shape)
    for k in range(len(right)):
        np.multiply(factors[:, k, None], right[k], out=product)
        product += total
        total[...] = product
    return total


def _find(names: Collection[str]) -> Choice | None:
    weights = next((name for name in WEIGHTS if name in names), None)
    if CONFIG not in names or weights is None:
        return None
    return Choice(NAME, (CONFIG, weights), beside=any(name in names for name in WHOLE))


def _open(folder: Path, choice: Choice, base: Base | None) -> Opened:
    return opened(folder, choice, base, read)


def opened(folder: Path, choice: Choice, base: Base | None, read: Read) -> Opened:
    """An adapter that is read on its base.

    Args:
        read: takes the adapter's configuration, its weights and the base's tensors.
    """
    if base is None:
        raise CheckpointError(f"{folder}: can only be read beside the model that it was made from.")
    files = {name: folder / name for name in choice.files}
    config, weights = files.values()
    tensors = read(config, weights, base.tensors)
    files |= {f"base/{name}": path for name, path in base.files.items()}
    return Opened(tensors, files, base.container if base.tensors.keys() == tensors.keys() else None)


FORMAT = Format(NAME, _find, _open, borrows=True, needs_base=True)
