"""Quantized checkpoints: codes and scales as the plain tensors that they stand for, which are computed while they are read.

config.json names the scheme. One module a scheme has its layout and formula; a new one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.formats.format import Opened, plain
from surgery.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from surgery.checkpoint.quantized.stored import Made, Stored
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError
from surgery.layout import place

KEY = "quantization_config"
# What quantized weights are packed into. A mask or a counter, of another integer type, is copied.
CODES = ("I8", "U8", "I16", "U16", "I32", "U32")
# By `quant_method`.
SCHEMES: dict[str, Callable[[Stored], Made]] = {
    "fp8": fp8.read,
    "mxfp4": mxfp4.read,
    "compressed-tensors": compressed_tensors.read,
    "bitsandbytes": bitsandbytes.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def holds_codes(tensor: Tensor) -> bool:
    """Whether a weight is stored as codes."""
    where = place(tensor.name)
    packed = tensor.dtype in CODES and not where.buffer and (where.layer is not None or where.category != "other")
    return tensor.is_quantized or packed


def method_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the quantization in a config.json, and what it says of it; "" where there is none."""
    parts = [config, *(plain(config.get(name)) for name in ("text_config", "llm_config", "language_config"))]
    found = next((plain(part[KEY]) for part in parts if plain(part.get(KEY))), {})
    return str(found.get("quant_method", "of no name")) if found else "", found


def dequantize(opened: Opened, config: Mapping[str, Any], where: Path) -> tuple[Opened, str]:
    """Weights that config.json calls quantized, as plain tensors.

    Args:
        opened: the tensors as they are stored.
        config: the content of config.json.
        where: that file.

    Returns:
        Without the codes and scales, in the order of the files; and the name of the quantization, "" where all weights are
        plain numbers or config.json names none.

    Raises:
        CheckpointError: a scheme that surgery does not read, or a part of a tensor is missing or does not fit.
    """
    method, about = method_of(config)
    if not method or not any(map(holds_codes, opened.tensors.values())):
        return opened, ""
    if method not in SCHEMES:
        raise CheckpointError(
            f"{where}: the weights are quantized by {method}, which surgery does not read (it reads {', '.join(SCHEMES)}). Write "
            "them as plain numbers first: load the model with transformers, then model.dequantize().save_pretrained(…)."
        )
    dtype = _dtype(config)
    made = SCHEMES[method](Stored(opened.tensors, about, dtype, where))
    if not made:
        return opened, ""
    tensors: dict[str, Tensor] = {}
    for name, tensor in opened.tensors.items():
        kept = made.get(name, tensor)
        if kept is None:
            continue
        if kept.name in tensors:
            raise CheckpointError(
                f"{kept.path}: holds {kept.name} twice, the second as {name}. Save the checkpoint again."
            )
        tensors[kept.name] = kept
    note = f"{where.parent}: weights are quantized ({method}): dequantized to {dtype} while they are read."
    return replace(opened, tensors=tensors, container=None, notes=(*opened.notes, note)), method


def _dtype(config: Mapping[str, Any]) -> str:
    """The type that config.json names for the weights; bfloat16 by default."""
    for part in (config, plain(config.get("text_config"))):
        for key in ("dtype", "torch_dtype"):
            if (found := TYPES.get(str(part.get(key)).removeprefix("torch."))) is not None:
                return found
    return "BF16"
