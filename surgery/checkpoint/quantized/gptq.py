"""GPTQ in 2, 4 and 8 bits (AutoGPTQ, GPTQModel).

    W[j, i] = (q[i, j] - z[g(i), j]) · s[g(i), j]

q is `qweight` int32 [inputs · bits / 32, outputs], the first input in the lowest bits; z is `qzeros` int32 [groups,
outputs · bits / 32], stored less 1, but as it is where `checkpoint_format` is "gptq_v2"; s is `scales` [groups, outputs]; g is
`g_idx` int32 [inputs], or i // group_size. The product is rounded to the type of s. Frantar et al., "GPTQ", 2022, and
`dequantize_weight` of the library.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from surgery.checkpoint.dtypes import Array, Floats
from surgery.checkpoint.quantized.packed import Transposed
from surgery.checkpoint.quantized.stored import Made, Stored, check_shape, dequantized, integer, unfit
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError

CODES = ".qweight"


def read(stored: Stored) -> Made:
    """Replace the weights that GPTQ quantized.

    Raises:
        CheckpointError: a part is missing or does not fit, or a layout or number of bits that surgery does not read.
    """
    bits = integer(stored.config, stored.where, "bits")
    layout = stored.config.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{stored.where}: the weights are GPTQ in {bits} bits and the layout {layout}, of which surgery reads 2, 4 and 8 "
            "bits in gptq and gptq_v2. Load the model with transformers and gptqmodel, and save it dequantized."
        )
    made: Made = {}
    for name, codes in stored.tensors.items():
        if name.endswith(CODES):
            made |= _tensor(stored, codes, bits, 0 if layout == "gptq_v2" else 1)
    return made


def _tensor(stored: Stored, codes: Tensor, bits: int, shift: int) -> Made:
    stem, per_word = codes.name.removesuffix(CODES), 32 // bits
    scales = stored.part(f"{stem}.scales", codes)
    zeros = stored.part(f"{stem}.qzeros", codes, ("I32",))
    order = stored.tensors.get(f"{stem}.g_idx")
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape or len(scales.shape) != 2:
        raise unfit(scales, codes)
    inputs, outputs = codes.shape[0] * per_word, codes.shape[1]
    groups = scales.shape[0]
    check_shape(scales, codes, (groups, outputs))
    check_shape(zeros, codes, (groups, -(-outputs // per_word)))
    size = stored.config.get("group_size")
    size = size if type(size) is int and size > 0 else inputs
    if order is not None:
        check_shape(stored.part(order.name, codes, ("I32",)), codes, (inputs,))
    elif groups != -(-inputs // size):
        raise unfit(scales, codes)
    scheme = Transposed(
        *(codes, zeros, scales, order),
        *(partial(_codes, bits), partial(_zeros, bits, shift)),
        *((outputs, inputs), size),
    )
    made = dequantized(f"{stem}.weight", (outputs, inputs), scheme, stored.dtype, via=scales.dtype)
    return {codes.name: made, scales.name: None, zeros.name: None} | ({order.name: None} if order else {})


def _codes(bits: int, words: Array, first: int, last: int) -> Floats:
    """q [inputs, last - first] of words uint32 [inputs / codes in a word, outputs]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found = words[:, None, first:last] >> shifts[None, :, None] & np.uint32((1 << bits) - 1)
    return found.reshape(-1, last - first).astype(np.float32)


def _zeros(bits: int, shift: int, words: Array, first: int, last: int) -> Floats:
    """z [groups, last - first] of words uint32 [groups, outputs / codes in a word]."""
    at = np.arange(first, last)
    found = words[:, at * bits // 32] >> (at * bits % 32).astype(np.uint32) & np.uint32((1 << bits) - 1)
    return found.astype(np.float32) + np.float32(shift)
