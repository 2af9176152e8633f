"""Weights in 8-bit floating point with a scale for each block or tensor: DeepSeek-V3, Qwen3-FP8, MiniMax, Ministral.

    W[i, j] = q[i, j] · s[i // height, j // width]

in float32, rounded once. `NAME` holds q, `NAME_scale_inv` (or `NAME_scale`) s, which is multiplied with in spite of its name:
DeepSeek-V3 technical report, section 3.3, and `weight_dequant` in its inference/kernel.py. The blocks are
`weight_block_size` [height, width], and the last of a row or column may be smaller; without it the shape of s tells them.
"""

from __future__ import annotations

from surgery.checkpoint.quantized.scaled import FLOAT8, Scaled, side
from surgery.checkpoint.quantized.stored import Made, Stored, dequantized, unfit
from surgery.checkpoint.tensor import Tensor

# Scales of activations, which no plain model has.
ACTIVATIONS = (".activation_scale", ".input_scale", "_activation_scale")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def read(stored: Stored) -> Made:
    """Replace the weights in 8-bit floating point.

    Raises:
        CheckpointError: a scale is missing or does not fit.
    """
    size = stored.config.get("weight_block_size")
    blocks = size if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size) else None
    made: Made = {}
    for name, codes in stored.tensors.items():
        if name.endswith(ACTIVATIONS):
            made[name] = None
        if codes.dtype not in FLOAT8:
            continue
        plain = f"{name}_scale"
        scale = stored.part(plain if plain in stored.tensors else f"{name}_scale_inv", codes, SCALES)
        made[name] = _tensor(codes, scale, blocks, stored.dtype)
        made[scale.name] = None
    return made


def _tensor(codes: Tensor, scale: Tensor, blocks: list[int] | None, dtype: str) -> Tensor:
    if scale.entries == 1:
        block = codes.shape[-2:] if len(codes.shape) > 1 else (max(codes.entries, 1), 1)
        return dequantized(codes.name, codes.shape, Scaled(codes, scale, codes.shape, (block[0], block[1])), dtype)
    if len(codes.shape) < 2 or len(scale.shape) != len(codes.shape) or scale.shape[:-2] != codes.shape[:-2]:
        raise unfit(scale, codes)
    height = side(codes.shape[-2], scale.shape[-2], blocks[0] if blocks else None)
    width = side(codes.shape[-1], scale.shape[-1], blocks[1] if blocks else None)
    if height is None or width is None:
        raise unfit(scale, codes)
    return dequantized(codes.name, codes.shape, Scaled(codes, scale, codes.shape, (height, width)), dtype)
