"""The experts of gpt-oss in MXFP4: 4-bit floating point, with a power of two for each 32 entries.

    W[e, 32·g + 2·b, r]     = f(blocks[e, r, g, b] & 15) · 2^(scales[e, r, g] - 127)
    W[e, 32·g + 2·b + 1, r] = f(blocks[e, r, g, b] >> 4) · 2^(scales[e, r, g] - 127)

f is E2M1: a sign bit and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. OCP Microscaling Formats (MX) 1.0, section 5. The model's parameter is
the transpose [experts, in, out] of what is stored, `NAME_blocks` uint8 [experts, out, in / 32, 16] and `NAME_scales` uint8
[experts, out, in / 32], so one expert at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import Floats
from surgery.checkpoint.quantized.stored import (
    Made,
    Stored,
    Values,
    check_shape,
    dequantized,
    powers_of_two,
    taken,
    unfit,
)
from surgery.checkpoint.tensor import Reader, Tensor

BLOCKS, SCALES = "_blocks", "_scales"
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*HALF, *(-value for value in HALF)], np.float32)
BYTES = 16  # of a block


def read(stored: Stored) -> Made:
    """Replace the experts in MXFP4.

    Raises:
        CheckpointError: a scale is missing or does not fit.
    """
    made: Made = {}
    for name, blocks in stored.tensors.items():
        if not name.endswith(BLOCKS) or blocks.dtype != "U8":
            continue
        if len(blocks.shape) != 4 or blocks.shape[3] != BYTES:
            raise unfit(blocks, blocks)
        plain = name.removesuffix(BLOCKS)
        scales = stored.part(plain + SCALES, blocks, ("U8",))
        check_shape(scales, blocks, blocks.shape[:3])
        experts, rows, groups = scales.shape
        shape = (experts, groups * BYTES * 2, rows)
        one = max(shape[1] * rows, 1)
        made[name] = dequantized(plain, shape, Experts(blocks, scales), stored.dtype, slab=one)
        made[scales.name] = None
    return made


@dataclass(frozen=True, slots=True)
class Experts:
    """Stacked experts in MXFP4."""

    blocks: Tensor
    scales: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.blocks, self.scales

    def start(self, readers: Sequence[Reader]) -> Values:
        blocks, scales = readers
        _, rows, groups = self.scales.shape
        of_expert, powers = rows * groups, powers_of_two()

        def values(first: int, last: int) -> Floats:
            expert = first // (of_expert * BYTES * 2)
            raw = taken(blocks, expert * of_expert * BYTES, (expert + 1) * of_expert * BYTES).reshape(of_expert, BYTES)
            scale = powers[taken(scales, expert * of_expert, (expert + 1) * of_expert)]
            made = np.empty((of_expert, BYTES, 2), np.float32)
            made[..., 0], made[..., 1] = NUMBERS[raw & 15], NUMBERS[raw >> 4]
            made *= scale[:, None, None]
            transposed: Floats = np.ascontiguousarray(made.reshape(rows, groups * BYTES * 2).T)
            return transposed.ravel()

        return values
