"""compressed-tensors (llm-compressor, vLLM): fp8, int8 and packed 4- or 8-bit integers.

    W = (q - z) · s

q is `weight` in 8-bit floating point or int8, or `weight_packed`: int32 words of codes, lowest first, of which half the range
(8 or 128) is taken off. s is `weight_scale`, for all of the tensor, each row, each group of columns in a row, or each block; z
is `weight_zero_point`, 0 where it is not stored. The product is rounded to the type of s, then to the output's, as the library's
`decompress` and transformers do: compressed_tensors/quantization/lifecycle/forward.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.checkpoint.quantized.scaled import FLOAT8, Scaled, side
from surgery.checkpoint.quantized.stored import AGAIN, Made, Stored, check_shape, dequantized, unfit
from surgery.checkpoint.tensor import Tensor, read_bytes
from surgery.errors import CheckpointError

FORMATS = ("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision")
PACKED = "weight_packed"
# Of activations and of the cache of keys and values: no plain model has them.
ACTIVATIONS = tuple(
    ".input_scale .input_zero_point .input_global_scale .output_scale .output_zero_point .k_scale .v_scale .q_scale "
    ".k_zero_point .v_zero_point .q_zero_point".split()
)


def read(stored: Stored) -> Made:
    """Replace the weights that compressed-tensors quantized.

    Raises:
        CheckpointError: a format that surgery does not read; a scale is missing or does not fit.
    """
    groups = stored.config.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    for said in (stored.config.get("format"), *(group.get("format") for group in groups)):
        if said is not None and said not in FORMATS:
            raise CheckpointError(
                f"{stored.where}: the weights are compressed as {said}, which surgery does not read (it reads "
                f"{', '.join(FORMATS[1:-1])}). Decompress them with transformers: from_pretrained with "
                "CompressedTensorsConfig(run_compressed=False), then save_pretrained."
            )
    structures = [_structure(group.get("weights")) for group in groups]
    block = next((found for found in structures if found), None)
    made: Made = {}
    for name, codes in stored.tensors.items():
        if name.endswith(ACTIVATIONS):
            made[name] = None
        if name.endswith(f".{PACKED}"):
            made |= _packed(stored, codes)
        elif name.endswith("weight") and codes.dtype in (*FLOAT8, "I8"):
            made |= _plain(stored, codes, block)
    return made


def _structure(weights: Any) -> list[int] | None:
    """The blocks [height, width] of a group of the configuration; None where it has none."""
    found = weights.get("block_structure") if isinstance(weights, dict) else None
    well_formed = isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    return found if well_formed else None


def _plain(stored: Stored, codes: Tensor, block: list[int] | None) -> Made:
    """A weight whose codes have a byte each."""
    scale = stored.part(f"{codes.name}_scale", codes)
    zeros = stored.tensors.get(f"{codes.name}_zero_point")
    if len(codes.shape) < 2:
        raise unfit(scale, codes)
    made = _tensor(stored, codes.name, codes, scale, zeros, codes.shape, block, packed=0)
    return {codes.name: made, scale.name: None} | ({zeros.name: None} if zeros else {})


def _packed(stored: Stored, codes: Tensor) -> Made:
    """A weight whose codes are packed into int32."""
    stem = codes.name.removesuffix("_packed")
    scale = stored.part(f"{stem}_scale", codes)
    size = stored.part(f"{stem}_shape", codes, ("I64", "I32"))
    zeros, groups = stored.tensors.get(f"{stem}_zero_point"), stored.tensors.get(f"{stem}_g_idx")
    if codes.dtype != "I32" or len(codes.shape) != 2 or size.shape != (2,):
        raise unfit(size, codes)
    rows, columns = map(int, np.frombuffer(read_bytes(size), "<i8" if size.dtype == "I64" else "<i4"))
    bits = next((bits for bits in (4, 8) if columns > 0 and -(-columns * bits // 32) == codes.shape[1]), None)
    if bits is None or rows != codes.shape[0]:
        raise CheckpointError(
            f"{codes.path}: {codes.name} of shape {list(codes.shape)} is no tensor of {rows} rows and {columns} columns in 4 "
            f"or 8 bits, the only ones that surgery unpacks. Decompress it with transformers, or: {AGAIN}"
        )
    if groups is not None:
        check_shape(stored.part(groups.name, codes, ("I32",)), codes, (columns,))
    made = _tensor(stored, stem, codes, scale, zeros, (rows, columns), None, packed=bits, groups=groups)
    parts = (scale, size, *(part for part in (zeros, groups) if part is not None))
    return {codes.name: made} | dict.fromkeys(part.name for part in parts)


def _tensor(
    stored: Stored,
    name: str,
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    shape: tuple[int, ...],
    block: list[int] | None,
    *,
    packed: int,
    groups: Tensor | None = None,
) -> Tensor:
    rows, columns = shape[-2:]
    if scale.entries == 1:
        sides: tuple[int | None, int | None] = rows, columns
    elif scale.shape == (*shape[:-2], rows):
        sides = 1, columns
    elif len(scale.shape) != len(shape) or scale.shape[:-2] != shape[:-2]:
        raise unfit(scale, codes)
    else:
        by_row = scale.shape[-2] == rows
        wanted = block if block and not by_row else [None, None]
        sides = 1 if by_row else side(rows, scale.shape[-2], wanted[0]), side(columns, scale.shape[-1], wanted[1])
    height, width = sides
    if height is None or width is None:
        raise unfit(scale, codes)
    if zeros is not None:
        if packed:
            check_shape(zeros, codes, (-(-rows * packed // 32), scale.shape[-1]))
        else:
            check_shape(zeros, codes, scale.shape)
        stored.part(zeros.name, codes, ("I32",) if packed else (codes.dtype,))
    scheme = Scaled(codes, scale, shape, (height, width), packed or 8, bool(packed), zeros, groups)
    return dequantized(name, shape, scheme, stored.dtype, via=scale.dtype)
