"""Whether a head is tied to the token embedding: one decision for a pair, from config.json and the tensors.

A tied head has the embedding's numbers. Where a checkpoint stores both, an edit must give both the same bits; where fine-tuning
parted them, config.json must say so, or a loader would drop the head that was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.readable import read_json
from surgery.checkpoint.tensor import Tensor
from surgery.layout import head_beside, place, tower

CONFIG = "config.json"
KEY = "tie_word_embeddings"
READ_BYTES = 1 << 20
TEXT = ("text_config", "llm_config", "language_config")
# Classes of models that have a head, stored or tied.
HEADED = re.compile(r"CausalLM|LMHead|ConditionalGeneration")


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json ties the head, in the part of the text model too; None where it does not say."""
    said = [part[KEY] for part in (*_parts(config), config) if isinstance(part.get(KEY), bool)]
    return any(said) if said else None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of config.json that describe the text model by itself."""
    parts = (config.get(name) for name in TEXT)
    return [part for part in parts if isinstance(part, Mapping)]


def embedding_and_head(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of the token embedding and of a head of its shape and type, of a checkpoint that stores one of each."""
    heads = [name for name, tensor in tensors.items() if _matrix(name, tensor, "head")]
    if len(heads) != 1:
        return None
    head = tensors[heads[0]]
    found = [
        name
        for name, tensor in tensors.items()
        if _matrix(name, tensor, "embedding") and (tensor.shape, tensor.dtype) == (head.shape, head.dtype)
    ]
    return (found[0], heads[0]) if len(found) == 1 else None


def tied_names(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The embedding and the head that a checkpoint stores both and ties, by their names; None where it does not.

    A config.json that unties them is believed; otherwise the numbers decide, which are read as far as they are the same.

    Raises:
        CheckpointError: config.json is damaged, or a file cannot be read.
    """
    names = embedding_and_head(tensors)
    if names is None or _said(folder) is False:
        return None
    return names if same_bytes(tensors[names[0]], tensors[names[1]]) else None


def tying(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The embedding and the head that a model ties, by their names, whether the head is stored or not; None where it ties none.

    Args:
        config: the model's config.json.
    """
    said = says_tied(config)
    if any(_matrix(name, tensor, "head") for name, tensor in tensors.items()):
        names = embedding_and_head(tensors)
        return names if names and said and same_bytes(tensors[names[0]], tensors[names[1]]) else None
    classes = config.get("architectures")
    headed = any(HEADED.search(str(name)) for name in classes) if isinstance(classes, list) and classes else bool(said)
    if said is False or not headed:
        return None
    rows = {part.get("vocab_size") for part in (config, *_parts(config))}
    found = [name for name, tensor in tensors.items() if _matrix(name, tensor, "embedding") and tensor.shape[0] in rows]
    return (found[0], head_beside(found[0])) if len(found) == 1 else None


def parted(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether config.json ties a head that the checkpoint stores with numbers of its own."""
    names = embedding_and_head(tensors)
    return names is not None and bool(_said(folder)) and not same_bytes(tensors[names[0]], tensors[names[1]])


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape hold the same bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with one.open() as first, other.open() as second:
        for start in range(0, one.nbytes, READ_BYTES):
            size = min(READ_BYTES, one.nbytes - start)
            parts = bytearray(size), bytearray(size)
            first.fill(start, memoryview(parts[0]))
            second.fill(start, memoryview(parts[1]))
            if parts[0] != parts[1]:
                return False
    return True


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a head of its own."""
    changed = {**config, KEY: False}
    for name in TEXT:
        if isinstance(config.get(name), Mapping) and KEY in config[name]:
            changed[name] = {**config[name], KEY: False}
    return changed


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The kinds of model that config.json names, of the text model too."""
    return {str(part["model_type"]) for part in (config, *_parts(config)) if "model_type" in part}


def config_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; nothing where there is none."""
    path = folder / CONFIG
    return read_json(path) if path.is_file() else {}


def _said(folder: Path) -> bool | None:
    return says_tied(config_of(folder))


def _matrix(name: str, tensor: Tensor, category: str) -> bool:
    where = place(name)
    return where.category == category and where.layer is None and len(tensor.shape) == 2 and not tower(name)
