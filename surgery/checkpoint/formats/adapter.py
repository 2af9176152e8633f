"""An adapter as peft writes it: adapter_config.json beside adapter_model.safetensors or .bin, put on its base while that is read.

Here each of its tensors finds the weight that it belongs to; `lora` has the formulas.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from surgery.checkpoint.formats import lora, safetensors
from surgery.checkpoint.formats.adapter_config import MERGE, Settings, principal
from surgery.checkpoint.formats.fit import Fit
from surgery.checkpoint.formats.format import Base, Choice, Format, Opened
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.checkpoint.tied import embedding_and_head, same_bytes, tying
from surgery.errors import CheckpointError
from surgery.layout import align, place, projections, unwrapped

NAME, CONFIG, WEIGHTS = "adapter", "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# A whole model beside an adapter: transformers loads it and puts the adapter on.
WHOLE = (safetensors.SINGLE, safetensors.INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "base_model.model."
# peft names the adapter in a model's own state dict ("lora_A.default.weight"), and leaves the name out where it saves.
PART = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|(?:token_adapter\.)?trainable_tokens_delta"
    r"|ia3_l|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|vera_lambda_[bd]|fourierft_spectrum)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
# What all modules have in common: of VeRA, which peft saves once.
SHARED = re.compile(r"(?:base_model\.)?(?P<kind>vera_[AB])")
UNKNOWN = re.compile(r"\.lora_|\.ia3_|\.hada_|\.lokr_|\.trainable_tokens_|\.modules_to_save\.|\.original_module\.")
# Of a vocabulary with more rows peft stores the saved modules twice more, under its wrapper's names.
COPY = re.compile(r"\.(modules_to_save|original_module)\.")
# What peft puts between a module and its own weight, and before what it trains of a module as a whole.
WRAPPED = re.compile(r"\.(?:base_layer|token_adapter|original_module|ln_tuning_layers)(?=\.|$)")
SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
# The order in which a module has its stacked experts; peft nests what is added to them in it.
ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
# Parts by the type of adapter.
LORA = {"lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
STARTS = {
    "ADALORA": "lora_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "VERA": "vera_",
    "FOURIERFT": "fourierft_",
}
Read = Callable[[Path, Path, Base], dict[str, Tensor]]
Parts = dict[str, Tensor]
Experts = dict[tuple[str, str, int], str]  # module, projection, number of the expert -> name of the tensor


def read(config: Path, weights: Path, base: Base, *, stored: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every tensor of the fine-tuned model, in the order and under the names of the base's.

    What the adapter does not touch is the base's own `Tensor`.

    Args:
        config: adapter_config.json.
        weights: adapter_model.safetensors or adapter_model.bin.
        base: the model that it was made for.
        stored: the adapter's tensors, where `weights` holds others too.

    Raises:
        CheckpointError: not an adapter that surgery reads, damaged, or made for another model.
    """
    settings = Settings(config)
    parts, whole = _sort(weights, _stored(weights) if stored is None else stored)
    if not parts and not whole:
        raise CheckpointError(f"{weights}: holds no tensor. Save the adapter again.")
    return _Reading(weights, settings, base).read(parts, whole)


def _stored(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        return read_header(weights).tensors
    from surgery.checkpoint.formats import pytorch

    return pytorch.read(weights)


def _sort(weights: Path, stored: Mapping[str, Tensor]) -> tuple[dict[str, Parts], Parts]:
    """The factors of each module, by kind ("lora_A", "lora_B.bias", …), and the tensors stored as a whole."""
    parts: dict[str, Parts] = {}
    whole: Parts = {}
    shared: Parts = {}
    for key, tensor in stored.items():
        if tensor.shape == (0,):
            raise CheckpointError(
                f"{weights}: {key} is empty, a placeholder that DeepSpeed ZeRO-3 saved in place of numbers: they are not in this "
                "file. Save it again with stage3_gather_16bit_weights_on_model_save set to true in DeepSpeed's configuration."
            )
        name = key.removeprefix(PREFIX)
        if match := PART.fullmatch(name):
            kind = match["kind"].rpartition(".")[2] + (".bias" if match["leaf"] == "bias" else "")
            of_module = parts.setdefault(match["module"], {})
            if kind in of_module:
                raise CheckpointError(
                    f"{weights}: holds several adapters ({match['adapter']} and another). Save the one you mean."
                )
            of_module[kind] = tensor
        elif match := SHARED.fullmatch(name):
            shared[match["kind"]] = tensor
        elif COPY.search(name) and COPY.sub(".", key) in stored:
            continue
        elif UNKNOWN.search(name):
            raise CheckpointError(f"{weights}: {key} is no part of plain LoRA. {MERGE}")
        else:  # modules_to_save, trained biases, an embedding with more rows, or the copy of one that LoRA was added to
            whole[WRAPPED.sub("", name)] = tensor
    return {module: {**of_module, **shared} for module, of_module in parts.items()}, whole


def merged(config: Path, weights: Path, base: Base) -> dict[str, Tensor]:
    """The tensors of a model in whose state dict an adapter's tensors lie beside the weights, as peft has it in memory.

    Args:
        config: the adapter's adapter_config.json.
        weights: the file, or one of them.
        base: the state dict.

    Raises:
        CheckpointError: as `read`.
    """
    plain, stored = {}, {}
    for name, tensor in base.tensors.items():
        key = unwrapped(name)
        if PART.fullmatch(key) or SAVED.search(key):
            stored[SAVED.sub("", key)] = tensor
        else:
            key = WRAPPED.sub("", key)
            plain[key] = replace(tensor, name=key)
    return read(config, weights, replace(base, tensors=plain), stored=stored)


class _Change(NamedTuple):
    """A change of one weight of the base.

    Attributes:
        key: the weight's name in the adapter.
        make: returns the changed weight for the weight before; raises CheckpointError where the two do not fit.
        tokens: it replaces rows, in a head that is tied to the embedding too.
        expert: gives the same for the part of one expert, where the base stores them one by one: number, place among the
            projections that are stored together, how many these are.
        optional: the base may lack the weight.
    """

    key: str
    make: Callable[[Tensor], Tensor]
    tokens: bool = False
    expert: Callable[[int, int, int, Tensor], Tensor] | None = None
    optional: bool = False


class _Reading:
    """An adapter that is put on a base."""

    def __init__(self, weights: Path, settings: Settings, base: Base) -> None:
        self.weights, self.settings, self.base = weights, settings, base
        self.fit = Fit(weights, settings, base)

    def read(self, parts: Mapping[str, Parts], whole: Parts) -> dict[str, Tensor]:
        changes = [change for module in parts for change in self._changes(module, parts)]
        keys = list(dict.fromkeys([*(change.key for change in changes), *whole]))
        touched = {place(key).category for key in keys}
        tied = tying(self.base.config, self.base.tensors) if touched & {"embedding", "head"} else None
        before = dict(self.base.tensors)
        if tied:
            before.setdefault(tied[1], replace(before[tied[0]], name=tied[1]))
        names, _ = align(before, keys)
        tuned = dict(before)
        stored = {names[key]: key for key in self._replacing(whole, names)}
        for name, key in stored.items():
            tuned[name] = replaced(self.weights, whole[key], before[name])
        if tied and tied[0] in stored and tied[1] not in stored and not self._apart(stored[tied[0]]):
            tuned[tied[1]] = replace(tuned[tied[0]], name=tied[1])  # the vocabulary grew
        rows = {names.get(change.key) for change in changes if change.tokens}
        added = set()
        for change in changes:
            for name, make in self._places(change, names):
                both = change.tokens and tied and name == tied[0] and tied[1] not in rows
                for each in tied if both and tied else (name,):
                    tuned[each] = make(tuned[each])
                added |= set() if change.tokens else {name}
        if tied:
            embedding, head = tied
            if self.settings.tied:
                one = True
            elif added & {embedding, head}:
                one = False
            elif head in stored or head in rows:
                one = same_bytes(tuned[embedding], tuned[head])
            else:
                one = not (embedding in stored and self._apart(stored[embedding]))
            tuned = self._as_one(embedding, head, tuned) if one else self._as_two(tuned)
        self._refuse_uneven(tuned, tied or embedding_and_head(self.base.tensors))
        return tuned

    def _as_one(self, embedding: str, head: str, tuned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with a head that is tied to the embedding: stored where the base stores it."""
        if head in self.base.tensors:
            return tuned | {head: replace(tuned[embedding], name=head)}
        return {name: tensor for name, tensor in tuned.items() if name != head}

    def _as_two(self, tuned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with a head that training parted from the embedding."""
        if self.base.config.get("is_encoder_decoder"):
            raise CheckpointError(
                f"{self.weights}: parts the head from the embedding of a model with encoder and decoder, which share it. {MERGE}"
            )
        return tuned

    def _refuse_uneven(self, tuned: Mapping[str, Tensor], names: tuple[str, str] | None) -> None:
        """Refuse a vocabulary that the adapter enlarged in one of embedding and head."""
        sizes = {name: tuned[name].shape[0] for name in names or () if name in tuned}
        if len(set(sizes.values())) > 1:
            most = max(sizes, key=lambda name: sizes[name])
            least = min(sizes, key=lambda name: sizes[name])
            raise CheckpointError(
                f"{self.weights}: holds {most} with {sizes[most]:,} rows, and {least} has the base's {sizes[least]:,}. Save the "
                "adapter with save_embedding_layers=True."
            )

    def _apart(self, key: str) -> bool:
        """Whether a module was trained as a whole, apart from what is tied to it."""
        return key.rpartition(".")[0].endswith(self.settings.saved) and not self.settings.tied

    def _replacing(self, whole: Parts, names: Mapping[str, str]) -> Iterator[str]:
        """The tensors that take the place of one of the base."""
        embedding = any(place(key).category == "embedding" for key in whole)
        for key in whole:
            if key in names:
                yield key
            elif place(key).category != "head" or not embedding or self._apart(key):
                raise no_base(self.weights, key)

    def _places(self, change: _Change, names: Mapping[str, str]) -> Sequence[tuple[str, Callable[[Tensor], Tensor]]]:
        """The tensors of the base that a change is made to, each with its part of it."""
        if change.key in names:
            return [(names[change.key], change.make)]
        found = projections(change.key)
        if found and change.expert:
            places = [
                (self._experts[found.module, role, number], partial(change.expert, number, index, len(found.roles)))
                for index, role in enumerate(found.roles)
                for number in range(len(self._experts))
                if (found.module, role, number) in self._experts
            ]
            if places:
                return places
        if change.optional:
            return []
        raise no_base(self.weights, change.key)

    @cached_property
    def _experts(self) -> Experts:
        return single_experts(self.base.tensors)

    def _changes(self, module: str, parts: Mapping[str, Parts]) -> Iterator[_Change]:
        """The changes that the factors of one module make."""
        of_module, plain = parts[module], WRAPPED.sub("", module)
        if "trainable_tokens_delta" in of_module:
            yield _Change(f"{plain}.weight", partial(self.fit.rows, plain, of_module), tokens=True)
            return
        if self.settings.kind != "LORA" or not LORA & of_module.keys():
            yield from self._others(module, of_module)
            return
        if targets := self._parameters(plain):
            nested = sorted((other for other in parts if WRAPPED.sub("", other) == plain), key=len, reverse=True)
            if len(nested) != len(targets):
                raise CheckpointError(
                    f"{self.weights}: {plain} has factors for {len(nested)} parameters, where {self.settings.path.name} targets "
                    f"{len(targets)}. {MERGE}"
                )
            key = targets[nested.index(module)]
            yield _Change(key, partial(self.fit.stack, key, of_module), expert=partial(self.fit.expert, key, of_module))
            return
        yield _Change(f"{module}.weight", partial(self.fit.weight, module, of_module))
        if "lora_B.bias" in of_module:
            yield _Change(f"{module}.bias", partial(self.fit.bias, module, of_module["lora_B.bias"]))

    def _others(self, module: str, parts: Parts) -> Iterator[_Change]:
        """The changes that an adapter of another type than LoRA makes."""
        make = {
            "ADALORA": self.fit.adaptive,
            "IA3": self.fit.multiplied,
            "LOHA": self.fit.hadamard,
            "LOKR": self.fit.kronecker,
            "VERA": self.fit.shared,
            "FOURIERFT": self.fit.fourier,
        }.get(self.settings.kind)
        if make is None or not all(kind.startswith(STARTS[self.settings.kind]) for kind in parts):
            raise CheckpointError(
                f"{self.weights}: {module}.{next(iter(parts))} is no part of an adapter of type {self.settings.kind}. {MERGE}"
            )
        yield _Change(f"{module}.weight", partial(make, module, parts))
        if self.settings.kind == "IA3":
            yield _Change(f"{module}.bias", partial(self.fit.multiplied, module, parts), optional=True)

    def _parameters(self, module: str) -> list[str]:
        """The parameters of a module that are targeted by themselves, in the order in which the model has them."""
        inner = {target.rpartition(".")[2] for target in self.settings.parameters}
        order = {name: number for number, name in enumerate(ORDER)}
        return [
            f"{module}.{name}"
            for name in sorted(inner, key=lambda name: (order.get(name, -1), name))
            if f".{module}.{name}".endswith(tuple(f".{target}" for target in self.settings.parameters))
        ]


def single_experts(tensors: Mapping[str, Tensor]) -> Experts:
    """The weights of experts that are stored one by one."""
    found = {name: projections(name) for name in tensors}
    return {
        (held.module, held.roles[0], held.expert): name
        for name, held in found.items()
        if held and held.expert is not None and held.kind == "weight" and len(held.roles) == 1
    }


def replaced(weights: Path, tensor: Tensor, before: Tensor) -> Tensor:
    """The tensors that the adapter stores as a whole, in the base's type."""
    if tensor.dtype == before.dtype:
        return replace(tensor, name=before.name)
    if not (tensor.is_float and before.is_float):
        raise CheckpointError(f"{weights}: {tensor.name} is {tensor.dtype}, where the base has {before.dtype}. {MERGE}")
    return Tensor(before.name, before.dtype, tensor.shape, lora.Computed(weights, tensor, before.dtype))


def no_base(weights: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{weights}: changes {key}, which the base does not store. Give the base that it was made for, or, where the base ties "
        "or fuses this weight, merge with peft's merge_and_unload and give the folder of that."
    )


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
        read: takes the adapter's configuration, its weights and the base.
    """
    if base is None:
        raise CheckpointError(f"{folder}: can only be read beside the model that it was made from.")
    files = {name: folder / name for name in choice.files}
    config, weights = files.values()
    tensors = read(config, weights, base)
    files |= {f"base/{name}": path for name, path in base.files.items()}
    container = base.container if base.tensors.keys() == tensors.keys() else None
    notes = []
    named = made_for(config)
    if named and not choice.beside and not _is_called(base.typed, named):
        notes.append(f"{config} names {named} as its base, and pre is {base.typed}: the two must be the same weights.")
    if begun := principal(read_json(config)):
        notes.append(
            f"{config} was begun by {begun}: what that took out of the base is computed again, by a decomposition of each weight "
            "that is touched, which takes long. save_pretrained with path_initial_model_for_weight_conversion spares it."
        )
    return Opened(tensors, files, container, tuple(notes))


def made_for(config: Path) -> str | None:
    """The base that an adapter's configuration names, as peft and mlx-lm write it; None where it names none."""
    values = read_json(config)
    named = values.get("base_model_name_or_path") or values.get("model")
    return named if isinstance(named, str) and named else None


def _is_called(typed: str, named: str) -> bool:
    """Whether what the user typed is the named model: the same path, or the last part of an id, in another folder too."""
    ends = [text.partition("@")[0].rstrip("/").rpartition("/")[2].lower() for text in (typed, named)]
    return ends[0] == ends[1] or os.path.realpath(typed) == os.path.realpath(named)


FORMAT = Format(NAME, _find, _open, borrows=True, needs_base=True)
