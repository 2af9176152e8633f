"""A checkpoint in a folder: its tensors, in whatever format they lie, and how its files are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.container import Container, Shard
from surgery.checkpoint.formats import ADAPTER, BY_ENDING, GGUF, META, PYTORCH, SAFETENSORS, Choice, choose
from surgery.checkpoint.formats.safetensors import Header, read_header
from surgery.checkpoint.hub import Source, resolve
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError, PairError
from surgery.layout import unwrapped

# These lack config.json and tokenizer, or most of it: the output's come from pre.
BORROWING = (ADAPTER, GGUF, META)
# These are read with the other side at hand: an adapter is added to its base, a GGUF file takes over the names.
DEPENDENT = (ADAPTER, GGUF)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk; no weights in memory.

    Attributes:
        format: one of the names in `surgery.checkpoint.formats`.
        tensors: every tensor, by name, in the order of the files. Where an index exists, it decides which shard holds one.
        files: the files that the weights are read from, by name.
        container: how the safetensors files are cut; None for another format.
        notes: what the user should know of how it was read.
    """

    source: Source
    format: str
    tensors: dict[str, Tensor]
    files: dict[str, Path]
    container: Container | None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.source.folder


def open_both(pre: str, *tuned: str) -> tuple[Checkpoint, list[Checkpoint]]:
    """Open a pre-trained model and the models that were fine-tuned from it, reading headers only.

    Args:
        pre, tuned: folders, files, or hub ids with an optional `@revision`.

    Raises:
        CheckpointError, HubError: as `open_checkpoint`.
        PairError: two that need each other's names.
    """
    sources = [resolve(typed, companions=True) for typed in tuned]
    choices = [weights_of(source) for source in sources]
    base = resolve(pre, companions=any(choice.format in BORROWING for choice in choices))
    base_format = weights_of(base).format
    if base_format == ADAPTER:
        raise CheckpointError(
            f"{base.folder}: is an adapter, so it cannot be `pre`. Give the model that it was made for."
        )
    if base_format == GGUF:
        if choices[0].format in DEPENDENT:
            raise PairError(
                f"{base.folder} and {sources[0].folder} both need the tensor names of the other side. Give one of them in the "
                "Hugging Face format."
            )
        first = open_checkpoint(sources[0])
        opened = open_checkpoint(base, other=first)
        return opened, [first, *(open_checkpoint(source, other=opened) for source in sources[1:])]
    opened = open_checkpoint(base)
    return opened, [open_checkpoint(source, other=opened) for source in sources]


def weights_of(source: Source) -> Choice:
    """Which files of a folder hold its weights.

    Raises:
        CheckpointError: there are none, or it is not clear which.
    """
    if source.file:
        ending = Path(source.file).suffix
        if ending not in BY_ENDING:
            raise CheckpointError(f"{source.folder / source.file}: is no checkpoint. Give the folder that holds one.")
        return Choice(BY_ENDING[ending], (source.file,))
    return choose(list(_names(source.folder)), f"{source.folder}:", CheckpointError)


def open_checkpoint(source: Source, *, other: Checkpoint | None = None) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        source: its folder.
        other: the other side of the pair, for an adapter or a GGUF file.

    Raises:
        CheckpointError: missing, damaged, or in a format that surgery does not read.
    """
    folder, choice = source.folder, weights_of(source)
    container = None
    if choice.format in (SAFETENSORS, PYTORCH):
        weight_map, metadata = _read_index(folder, choice) if choice.index else ({}, None)
        files = {name: folder / name for name in sorted(set(weight_map.values()) or set(choice.files))}
        if choice.format == SAFETENSORS:
            headers = {name: read_header(path) for name, path in files.items()}
            tensors = _assign(folder, choice, {name: header.tensors for name, header in headers.items()}, weight_map)
            container = _container(headers, tensors, metadata)
        else:
            from surgery.checkpoint.formats import pytorch

            shards = {name: pytorch.read(path) for name, path in files.items()}
            tensors = _assign(folder, choice, shards, weight_map)
    else:
        files = {name: folder / name for name in choice.files}
        if choice.format == META:
            from surgery.checkpoint.formats import meta

            tensors = meta.read(*files.values())
        elif other is None:
            raise CheckpointError(f"{folder}: can only be read beside the model that it was made from.")
        elif choice.format == ADAPTER:
            from surgery.checkpoint.formats import adapter

            config, weights = files.values()
            tensors = adapter.read(config, weights, other.tensors)
            files |= {f"base/{name}": path for name, path in other.files.items()}
            container = other.container if other.tensors.keys() == tensors.keys() else None
        else:
            from surgery.checkpoint.formats import gguf

            tensors = gguf.read(folder / choice.files[0], other.tensors)
    if not tensors:
        raise CheckpointError(f"{folder}: the checkpoint holds no tensor.")
    plain, container = _unwrapped(tensors, container)
    notes = []
    if plain is not tensors:
        first = next(name for name in tensors if name not in plain)
        notes.append(
            f"{first} and its like are called {unwrapped(first)} from here on: what training put before it is gone."
        )
    return Checkpoint(source, choice.format, plain, files, container, tuple(notes))


def _unwrapped(tensors: dict[str, Tensor], container: Container | None) -> tuple[dict[str, Tensor], Container | None]:
    """Tensors under the names that transformers loads: without what torch.compile, FSDP or DDP put into them."""
    names = {name: unwrapped(name) for name in tensors}
    if len(set(names.values())) < len(names) or all(name == plain for name, plain in names.items()):
        return tensors, container
    renamed = {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}
    if container is not None:
        shards = {
            file: Shard(tuple(names[name] for name in shard.names), shard.metadata)
            for file, shard in container.shards.items()
        }
        container = Container(shards, container.index)
    return renamed, container


def _names(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name == "original" and path.is_dir():
            yield from (f"original/{inner.name}" for inner in path.iterdir())
        else:
            yield path.name


def _read_index(folder: Path, choice: Choice) -> tuple[dict[str, str], dict[str, Any]]:
    path = folder / str(choice.index)
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map. Save the checkpoint again.")
    ending = ".safetensors" if choice.format == SAFETENSORS else ".bin"
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in ("/", "\\", "\0")):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard!r}, which is not a file of this folder; refused. Correct the index."
            )
        if not shard.endswith(ending):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard}, which is no {ending[1:]} file. Correct the index."
            )
        if not (folder / shard).exists():
            raise CheckpointError(f"{path}: names the shard {shard}, which is missing. Download it again.")
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _assign(
    folder: Path, choice: Choice, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str]
) -> dict[str, Tensor]:
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / str(choice.index)}: says that {shard} holds tensor {name}, which it does not."
            )
    tensors: dict[str, Tensor] = {}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if weight_map.get(name, shard) != shard:
                continue
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {name} is in two shards and the index names neither.")
            tensors[name] = tensor
    return tensors


def _container(headers: dict[str, Header], tensors: dict[str, Tensor], index: dict[str, Any] | None) -> Container:
    shards = {}
    for file, header in headers.items():
        names = tuple(name for name, tensor in header.tensors.items() if tensors.get(name) is tensor)
        if names:
            shards[file] = Shard(names, header.metadata)
    return Container(shards, index)
