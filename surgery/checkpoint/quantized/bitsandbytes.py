"""bitsandbytes: nf4 and fp4, with and without double quantization, and int8.

4 bit, of the i-th entry of the flat tensor, in blocks of B entries:

    w[i] = m[q[i]] · a[i // B]

m is the 16 numbers of `quant_map`; q are the codes, the upper four bits of a byte first; a is `absmax`. Double quantization has a
in 8 bits: a[j] = m2[absmax[j]] · a2[j // B2] + c, with m2 `nested_quant_map`, a2 `nested_absmax` and c `nested_offset`. B, B2, c,
the shape and the type that w is rounded to stand as JSON in `quant_state.bitsandbytes__nf4` (or fp4). QLoRA, Dettmers et al.,
2023, equation 6, and `QuantState` in bitsandbytes/functional.py.

int8: W[i, j] = q[i, j] · SCB[i] / 127. LLM.int8(), Dettmers et al. 2022, section 2.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import Floats
from surgery.checkpoint.quantized.scaled import Scaled
from surgery.checkpoint.quantized.stored import (
    AGAIN,
    SLAB,
    Made,
    Stored,
    Values,
    as_floats,
    check_shape,
    dequantized,
    floats,
    taken,
    unfit,
)
from surgery.checkpoint.tensor import Reader, Tensor, read_bytes
from surgery.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MOST_STATE = 1 << 16  # bytes of JSON
BY_127 = 7.874015718698502e-3  # as bitsandbytes writes 1/127


def read(stored: Stored) -> Made:
    """Replace the weights that bitsandbytes quantized.

    Raises:
        CheckpointError: a part is missing, damaged or does not fit.
    """
    made: Made = {}
    for name, tensor in stored.tensors.items():
        if STATE in name:
            weight, _, kind = name.rpartition(STATE)
            if kind not in KINDS or weight not in stored.tensors:
                raise CheckpointError(f"{tensor.path}: {name} has no weight that surgery knows beside it. {AGAIN}")
            made |= _four_bits(stored, stored.tensors[weight], tensor)
        elif name.endswith("weight") and tensor.dtype == "I8":
            made |= _eight_bits(stored, tensor)
        elif name.endswith(".absmax"):
            weight = name.removesuffix(".absmax")
            if weight in stored.tensors and not any(f"{weight}{STATE}{kind}" in stored.tensors for kind in KINDS):
                stored.part(f"{weight}{STATE}{KINDS[0]}", stored.tensors[weight])
    return made


def _eight_bits(stored: Stored, codes: Tensor) -> Made:
    stem = codes.name.removesuffix("weight")
    scale = stored.part(f"{stem}SCB", codes, ("F32", "F16", "BF16"))
    if len(codes.shape) != 2:
        raise unfit(scale, codes)
    check_shape(scale, codes, codes.shape[:1])
    made: Made = {scale.name: None}
    if (layout := stored.tensors.get(f"{stem}weight_format")) is not None:
        if layout.entries != 1 or any(read_bytes(layout)):
            raise CheckpointError(
                f"{layout.path}: {codes.name} is not stored row by row ({layout.name} is not 0), which surgery does not read. "
                "Load the model with transformers and bitsandbytes, and save it again."
            )
        made[layout.name] = None
    scheme = Scaled(codes, scale, codes.shape, (1, max(codes.shape[1], 1)), factor=BY_127)
    return made | {codes.name: dequantized(codes.name, codes.shape, scheme, stored.dtype)}


@dataclass(frozen=True, slots=True)
class State:
    """The state that bitsandbytes stores beside a 4-bit tensor; `nested_block` is 0 without double quantization."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int
    offset: float


def _state(tensor: Tensor, *, nested: bool) -> State:
    broken = CheckpointError(
        f"{tensor.path}: {tensor.name}, which says how a quantized weight is laid, is damaged. {AGAIN}"
    )
    if tensor.dtype != "U8" or tensor.nbytes > MOST_STATE:
        raise broken
    try:
        said: dict[str, Any] = json.loads(read_bytes(tensor))
        shape, dtype, block = tuple(said["shape"]), TYPES[said["dtype"]], said["blocksize"]
        nested_block = said["nested_blocksize"] if nested else 0
        offset = float(said["nested_offset"]) if nested else 0.0
    except (ValueError, TypeError, KeyError, RecursionError):
        raise broken from None
    numbers = [*shape, block, nested_block]
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers):
        raise broken
    if block < 2 or block % 2 or block > SLAB or (nested and nested_block < 1):
        raise broken
    return State(shape, dtype, block, nested_block, offset)


def _four_bits(stored: Stored, codes: Tensor, about: Tensor) -> Made:
    name = codes.name
    nested = f"{name}.nested_absmax" in stored.tensors
    state = _state(about, nested=nested)
    entries = math.prod(state.shape)
    # The codes may be stored as another type (bnb_4bit_quant_storage), filled up to a whole number of it.
    if not 0 <= codes.nbytes - (entries + 1) // 2 < max(codes.nbytes // max(codes.entries, 1), 1):
        raise unfit(about, codes)
    blocks = -(-entries // state.block)
    absmax = stored.part(f"{name}.absmax", codes, ("U8",) if nested else ("F32", "BF16", "F16"))
    numbers = stored.part(f"{name}.quant_map", codes)
    check_shape(absmax, codes, (blocks,))
    check_shape(numbers, codes, (16,))
    parts = [absmax, numbers]
    if nested:
        scale = stored.part(f"{name}.nested_absmax", codes)
        table = stored.part(f"{name}.nested_quant_map", codes)
        check_shape(scale, codes, (-(-blocks // state.nested_block),))
        check_shape(table, codes, (256,))
        parts += [scale, table]
    slab = SLAB // state.block * state.block
    made = dequantized(name, state.shape, Nibbles(state, codes, *parts), stored.dtype, slab=slab, via=state.dtype)
    return {name: made, about.name: None} | dict.fromkeys(part.name for part in parts)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """A flat tensor in 4 bits; `nested_absmax` and `nested_map` with double quantization."""

    state: State
    codes: Tensor
    absmax: Tensor
    numbers: Tensor
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None

    @property
    def sources(self) -> tuple[Tensor, ...]:
        found = (self.codes, self.absmax, self.numbers, self.nested_absmax, self.nested_map)
        return tuple(tensor for tensor in found if tensor is not None)

    def start(self, readers: Sequence[Reader]) -> Values:
        codes, absmax, numbers, *nested = readers
        known, state = floats(numbers), self.state
        if known[8] == 0:  # fp4: its upper half is negative, also the zero, which the kernels make of the sign bit
            known[8] = -0.0
        outer, outer_map = (floats(reader) for reader in nested) if nested else (None, None)

        def scales(first: int, last: int) -> Floats:
            if outer is None or outer_map is None:
                width = absmax.tensor.nbytes // absmax.tensor.entries
                return as_floats(absmax.tensor.dtype, taken(absmax, first * width, last * width))
            made: Floats = outer_map[taken(absmax, first, last)] * outer[np.arange(first, last) // state.nested_block]
            return made + np.float32(state.offset)

        def values(first: int, last: int) -> Floats:
            raw = taken(codes, first // 2, (last + 1) // 2)
            found = known[np.stack([raw >> 4, raw & 15], axis=-1).ravel()[: last - first]]
            scale = scales(first // state.block, -(-last // state.block))
            made: Floats = found * np.repeat(scale, state.block)[: last - first]
            return made

        return values
