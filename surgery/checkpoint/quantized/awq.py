"""AWQ in 4 bits (AutoAWQ's "gemm" layout).

    W[j, i] = (q[i, j] - z[i // G, j]) · s[i // G, j]

q is `qweight` int32 [inputs, outputs / 8], z is `qzeros` int32 [groups, outputs / 8], s is `scales` [groups, outputs], G is
`group_size`. The outputs of a word lie in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first. The product is rounded to the type
of s. Lin et al., "AWQ", 2023, and awq/utils/packing_utils.py of the library.
"""

from __future__ import annotations

import numpy as np

from surgery.checkpoint.dtypes import Array, Floats
from surgery.checkpoint.quantized.packed import Transposed
from surgery.checkpoint.quantized.stored import Made, Stored, check_shape, dequantized, integer, unfit
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError

CODES = ".qweight"
BITS, PER_WORD = 4, 8
# The bit that the code of each output of a word begins at.
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)


def read(stored: Stored) -> Made:
    """Replace the weights that AWQ quantized.

    Raises:
        CheckpointError: a part is missing or does not fit, or a layout or number of bits that surgery does not read.
    """
    bits = integer(stored.config, stored.where, "bits", "w_bit")
    layout = str(stored.config.get("version") or stored.config.get("format") or "gemm").lower()
    if bits != BITS or layout != "gemm":
        raise CheckpointError(
            f"{stored.where}: the weights are AWQ in {bits} bits and the layout {layout}, of which surgery reads 4 bits in "
            "gemm alone. Load the model with the library that wrote it, and save it dequantized."
        )
    size = integer(stored.config, stored.where, "group_size", "q_group_size")
    made: Made = {}
    for name, codes in stored.tensors.items():
        if name.endswith(CODES):
            made |= _tensor(stored, codes, size)
    return made


def _tensor(stored: Stored, codes: Tensor, size: int) -> Made:
    stem = codes.name.removesuffix(CODES)
    scales = stored.part(f"{stem}.scales", codes)
    zeros = stored.part(f"{stem}.qzeros", codes, ("I32",))
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        raise unfit(scales, codes)
    inputs, outputs = codes.shape[0], codes.shape[1] * PER_WORD
    size = size if size > 0 else inputs
    groups = -(-inputs // size)
    check_shape(scales, codes, (groups, outputs))
    check_shape(zeros, codes, (groups, codes.shape[1]))
    scheme = Transposed(codes, zeros, scales, None, _columns, _columns, (outputs, inputs), size)
    made = dequantized(f"{stem}.weight", (outputs, inputs), scheme, stored.dtype, via=scales.dtype)
    return {codes.name: made, scales.name: None, zeros.name: None}


def _columns(words: Array, first: int, last: int) -> Floats:
    """The codes [inputs or groups, last - first] of words uint32 [inputs or groups, outputs / 8]."""
    at = np.arange(first, last)
    found = words[:, at // PER_WORD] >> SHIFTS[at % PER_WORD] & np.uint32(15)
    return found.astype(np.float32)
