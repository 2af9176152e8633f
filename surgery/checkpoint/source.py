"""A checkpoint in a folder: which file holds which tensor, and what the folder says about the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import Header, Tensor, read_header
from surgery.checkpoint.hub import Source, resolve
from surgery.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Headers of a model on disk; no weights.

    Attributes:
        shards: the file name of each shard and its header, in the order of the names.
        tensors: every tensor, by name. Where an index exists, it decides which shard holds a tensor.
        index: the index's "metadata", None for a model in a single file.
    """

    source: Source
    shards: dict[str, Header]
    tensors: dict[str, Tensor]
    index: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.source.folder


def open_checkpoint(typed: str, *, needs_config: bool = False) -> Checkpoint:
    """Find a checkpoint and read its headers.

    Args:
        typed: a folder, or a hub id with an optional `@revision`.
        needs_config: refuse a folder without config.json, and fetch tokenizer and other companions too: the output's are
            taken from here.

    Raises:
        CheckpointError: missing, damaged, or not a safetensors checkpoint.
        HubError: the repository cannot be fetched.
    """
    source = resolve(typed, companions=needs_config)
    folder = source.folder
    weight_map, index = _weight_map(folder)
    shards = {name: read_header(folder / name) for name in sorted(set(weight_map.values()) or {_single(folder)})}
    tensors = _assign(folder, shards, weight_map)
    if not tensors:
        raise CheckpointError(f"{folder}: the checkpoint holds no tensor.")
    if (folder / "config.json").exists():
        _read_json(folder / "config.json")
    elif needs_config:
        raise CheckpointError(f"{folder}: config.json is missing, so nothing could load the result. Copy it there.")
    return Checkpoint(source, shards, tensors, index)


def _weight_map(folder: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    # As in transformers, a single file stands before an index.
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return {}, None
    path = folder / INDEX
    index = _read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map. Save the checkpoint again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in ("/", "\\", "\0")):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard!r}, which is not a file of this folder; refused. Correct the index."
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard}, which is no safetensors file. Correct the index."
            )
        if not (folder / shard).exists():
            raise CheckpointError(f"{path}: names the shard {shard}, which is missing. Download it again.")
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _single(folder: Path) -> str:
    if (folder / WEIGHTS).exists():
        return WEIGHTS
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: has {len(found)} safetensors files but no {INDEX} to say how they belong together."
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: is an adapter, not a whole checkpoint. Merge it into its base model first.")
    other = next((path.name for pattern in OTHER_FORMATS for path in sorted(folder.glob(pattern))), None)
    if other:
        raise CheckpointError(f"{folder}: has {other} but no safetensors file. Save the model as safetensors first.")
    raise CheckpointError(f"{folder}: not a checkpoint: it has neither {WEIGHTS} nor {INDEX}.")


def _assign(folder: Path, shards: dict[str, Header], weight_map: dict[str, str]) -> dict[str, Tensor]:
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(f"{folder / INDEX}: says that {shard} holds tensor {name}, which it does not.")
    tensors: dict[str, Tensor] = {}
    for shard, header in shards.items():
        for name, tensor in header.tensors.items():
            if weight_map.get(name, shard) != shard:
                continue
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {name} is in two shards and the index names neither.")
            tensors[name] = tensor
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it. Change its mode or run as its owner.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not valid JSON. Download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object.")
    return value
