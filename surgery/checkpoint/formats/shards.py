"""A model that is cut into several files: by an index that says which tensor lies where, or by the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.checkpoint.formats.format import Choice, Unclear, top_level
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError
from surgery.paths import exists

# model-00001-of-00002.safetensors, ft-model-00001-of-00002.safetensors; hf_model_0001_0.pt of torchtune.
NUMBERED = re.compile(
    r"(?P<stem>.*?)[-_.]?(?P<number>[0-9]{1,5})(?:[-_]of[-_](?P<count>[0-9]{1,5})|_[0-9]+)(?P<ending>\.\w+)"
)


def numbered_set(names: Sequence[str]) -> tuple[str, ...]:
    """The files of a model that was cut without an index, in order.

    Args:
        names: files of one format, two or more.

    Raises:
        Unclear: they are not the parts of one model, or a part is missing.
    """
    found = [NUMBERED.fullmatch(name) for name in names]
    parts = [part for part in found if part]
    if len(parts) < len(names):
        raise Unclear("which do not look like parts of one model")
    kinds = {(part["stem"], part["count"]) for part in parts}
    if len(kinds) > 1:
        raise Unclear("which are parts of different models")
    count = parts[0]["count"]
    numbers = {int(part["number"]) for part in parts}
    if count is not None and len(numbers) < int(count):
        lowest = 0 if 0 in numbers else 1
        missing = next(number for number in range(lowest, lowest + int(count)) if number not in numbers)
        raise Unclear(f"which are {len(numbers)} of {int(count)} parts: part {missing} is missing")
    return tuple(sorted(names))


def stale_index(folder: Path, choice: Choice, ending: str) -> Choice | None:
    """The numbered files that lie in the folder, where its index is of an earlier cut: it names files none of which is there.

    Args:
        ending: of the shards.
    """
    weight_map = read_json(folder / str(choice.index)).get("weight_map")
    named = (
        {shard for shard in weight_map.values() if isinstance(shard, str)} if isinstance(weight_map, dict) else set()
    )
    names = top_level([path.name for path in folder.iterdir()], (ending,))
    there = [name for name in names if NUMBERED.fullmatch(name)]
    if not named or named & set(names) or not there:
        return None
    try:
        files = numbered_set(there)
    except Unclear:
        return None
    note = f"{choice.index} names files of an earlier cut, none of which is there: the {len(files)} files that are were read."
    return Choice(choice.format, files, inside=choice.inside, notes=(note,))


def read_index(folder: Path, choice: Choice, ending: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The shard of each tensor, and the index's own metadata.

    Args:
        ending: of the shards.

    Raises:
        CheckpointError: the index is damaged, or names a file that is missing or outside the folder.
    """
    path = folder / str(choice.index)
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map. Save the checkpoint again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in ("/", "\\", "\0")):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard!r}, which is not a file of this folder; refused. Correct the index."
            )
        if not shard.endswith(ending):
            raise CheckpointError(
                f"{path}: puts tensor {name} in {shard}, which is no {ending[1:]} file. Correct the index."
            )
        if not exists(folder / shard):
            raise CheckpointError(f"{path}: names the shard {shard}, which is missing. Download it again.")
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def join(
    folder: Path, choice: Choice, shards: Mapping[str, Mapping[str, Tensor]], weight_map: Mapping[str, str]
) -> dict[str, Tensor]:
    """All tensors of the shards. Where an index exists, it decides which shard holds one.

    Raises:
        CheckpointError: the index contradicts the shards, or two of them hold one tensor.
    """
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
