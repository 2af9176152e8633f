"""How an output is cut into safetensors files: as ft was, or by huggingface_hub's own rule where ft was in another format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.tensor import Tensor
from surgery.errors import OptionError

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: the names of its tensors in the order of their data, and the header's metadata."""

    names: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Container:
    """The files of a checkpoint by name, and the index's "metadata", None where there is no index."""

    shards: dict[str, Shard]
    index: dict[str, Any] | None


def split(tensors: Mapping[str, Tensor], max_shard_size: str) -> Container:
    """Deal tensors to files of at most a size, in their order, as save_pretrained does.

    Args:
        max_shard_size: "5GB", "500MB", "100KB"; in powers of ten.

    Raises:
        OptionError: that is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)", max_shard_size.upper()):
        raise OptionError(f"`max_shard_size` takes a size such as 5GB or 500MB, not {max_shard_size!r}.")
    parts = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size.upper(),
    )
    shards = {file: Shard(tuple(names), {"format": "pt"}) for file, names in parts.filename_to_tensors.items()}
    return Container(shards, parts.metadata if parts.is_sharded else None)
