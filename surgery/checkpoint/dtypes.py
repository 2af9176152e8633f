"""The types of numbers: what safetensors calls them, their sizes, what torch and numpy have for them, and exact conversions.

Nothing heavy is imported: torch's types are names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Floats = NDArray[np.float32]

FLOAT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
INTEGER_BITS = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}
QUANTIZED_BITS = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
BITS = {**FLOAT_BITS, **INTEGER_BITS, **QUANTIZED_BITS, "C64": 64}

# What numpy reads a stored number as: bfloat16, which it lacks, as the bits.
RAW: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
# torch's names of the types that it has.
TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def torch_type(dtype: str) -> torch.dtype:
    """torch's type for a name of safetensors' that `TORCH` has."""
    import torch

    found: torch.dtype = getattr(torch, TORCH[dtype])
    return found


def widen(dtype: str, raw: Array) -> Array:
    """The chunk's values as float32, exactly (float64 for "F64")."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64 if dtype == "F64" else np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """Values (float32 or float64) rounded to the nearest stored value of dtype, ties to even: a raw chunk."""
    if dtype != "BF16":
        return values.astype(RAW[dtype])
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= 16
    stored = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        stored[nan] = bits[nan] >> 16 | 0x40
    return stored
