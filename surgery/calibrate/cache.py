"""Norms in a file, so that a sweep over sparsities calibrates once.

The file is safetensors: NAME:values F32 [k] or [E, k] and NAME:tokens I64 [] or [E] for each weight. The metadata says, as JSON,
which weights are stored [in, out], and under "key" what the norms depend on: the weights' fingerprint, the samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError, OptionError
from surgery.methods.wanda import Norm
from surgery.paths import Kind, OutFile

FORMAT = "surgery-input-norms"


def saved(path: Path) -> bool:
    """Whether a file holds norms that `save` wrote."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except CheckpointError:
        return False


NORMS = Kind("file of norms", (".safetensors",), saved)


def save(path: Path, norms: Mapping[str, Norm], key: Mapping[str, Any], inputs: Iterable[Path] = ()) -> None:
    """Write norms and what they depend on, whole or not at all; earlier norms that are there are replaced.

    Args:
        key: JSON values; "weights" is the fingerprint.
        inputs: files and folders that must not be written to.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.numpy import save as encode

    tensors = {}
    for name, norm in norms.items():
        tensors[f"{name}:values"] = np.ascontiguousarray(norm.values)
        tensors[f"{name}:tokens"] = np.asarray(norm.tokens, np.int64)
    transposed = [name for name, norm in norms.items() if norm.transposed]
    metadata = {"format": FORMAT, "key": json.dumps(dict(key), sort_keys=True), "transposed": json.dumps(transposed)}
    with OutFile(path, NORMS, "save_norms", inputs) as out:
        out.write(encode(tensors, metadata))


def load(path: Path, key: Mapping[str, Any]) -> dict[str, Norm]:
    """Read norms that were saved for these weights.

    Args:
        key: what has to be the same as when they were saved; other parts of the saved key may be anything.

    Raises:
        OptionError: the file is no such file, is damaged, or was made for something else.
    """
    stored, transposed, tensors = _open(path)
    for name, value in key.items():
        if stored.get(name) == value:
            continue
        if name == "weights":
            raise OptionError(f"{path}: was made for other weights than these. Calibrate again with `calibration`.")
        raise OptionError(
            f"{path}: was made with {name} {json.dumps(stored.get(name))}, not {json.dumps(value)}. Calibrate again with "
            "`calibration`."
        )
    norms = {}
    for name in (full.removesuffix(":values") for full in tensors if full.endswith(":values")):
        values, tokens = tensors[f"{name}:values"], tensors.get(f"{name}:tokens")
        if tokens is None or not _fits(values, tokens):
            raise OptionError(f"{path}: what it holds of {name} is damaged. Calibrate again with `calibration`.")
        counts = np.frombuffer(_bytes(tokens), "<i8").reshape(tokens.shape)
        norms[name] = Norm(
            np.frombuffer(_bytes(values), "<f4").reshape(values.shape),
            name in transposed,
            counts if counts.ndim else int(counts),
        )
    return norms


def stored_key(path: Path) -> dict[str, Any]:
    """Everything that the norms in a file depend on.

    Raises:
        OptionError: the file is no such file, or is damaged.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[dict[str, Any], set[str], dict[str, Tensor]]:
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise OptionError(f"`norms` {error}") from error
    if header.metadata.get("format") != FORMAT:
        raise OptionError(f"{path}: holds no norms. Make them with `save_norms`.")
    try:
        key, transposed = json.loads(header.metadata["key"]), json.loads(header.metadata["transposed"])
        sound = (
            isinstance(key, dict) and isinstance(transposed, list) and all(isinstance(name, str) for name in transposed)
        )
    except (KeyError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise OptionError(f"{path}: its metadata is damaged. Calibrate again with `calibration`.")
    return key, set(transposed), header.tensors


def _fits(values: Tensor, tokens: Tensor) -> bool:
    return (values.dtype, tokens.dtype, len(values.shape)) == ("F32", "I64", len(tokens.shape) + 1) and (
        values.shape[:-1] == tokens.shape
    )


def _bytes(tensor: Tensor) -> bytearray:
    raw = bytearray(tensor.nbytes)
    with tensor.open() as reader:
        reader.fill(0, memoryview(raw))
    return raw
