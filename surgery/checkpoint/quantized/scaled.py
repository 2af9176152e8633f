"""Matrices of codes with a scale for each block of entries: one formula for fp8, int8 and packed integers.

    W[i, j] = (q[i, j] - z[b(i, j)]) · s[b(i, j)]

with q the code as a number, b the block that the entry lies in, s its scale and z its zero point (0 where there is none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import BITS, Array, Floats
from surgery.checkpoint.quantized.stored import Values, floats, taken, unfit, whole
from surgery.checkpoint.tensor import Reader, Tensor

FLOAT8 = ("F8_E4M3", "F8_E5M2")


def table(dtype: str) -> Floats:
    """The number that each byte of an 8-bit type is, float32 [256].

    E4M3 (fn): (-1)^s · 2^(e-7) · (1 + m/8), without infinities, NaN where all of e and m is set. E5M2: the upper half of a
    float16. Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1.
    """
    codes = np.arange(256)
    if dtype == "I8":
        integers: Floats = codes.astype(np.uint8).view(np.int8).astype(np.float32)
        return integers
    if dtype == "F8_E5M2":
        halves: Floats = (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        return halves
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    size[(codes & 127) == 127] = np.nan
    numbers: Floats = (np.where(codes & 128, -1.0, 1.0) * size).astype(np.float32)
    return numbers


def side(length: int, count: int, wanted: int | None) -> int | None:
    """How many of `length` rows or columns one of `count` scales is for; the last may be for fewer. None where it is unclear."""
    if count == 1:
        return max(length, 1)
    if wanted and -(-length // wanted) == count:
        return wanted
    return length // count if count and length and length % count == 0 else None


@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor [..., rows, columns] of codes with scales [..., rows / height, columns / width].

    Attributes:
        shape: of the numbers.
        block: height and width of a block.
        bits: of a code; below 8 and where `packed`, codes are packed into int32, lowest first, with half their range added.
        zeros: the zero points, of the type and packing of the codes, one for each scale; packed ones along the rows.
        groups: int32 [columns], for each column that of the scales, in place of the width of a block.
        factor: a constant that the product is multiplied with.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    block: tuple[int, int]
    bits: int = 8
    packed: bool = False
    zeros: Tensor | None = None
    groups: Tensor | None = None
    factor: float = 1.0

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.codes, self.scales, self.zeros, self.groups) if tensor is not None)

    def start(self, readers: Sequence[Reader]) -> Values:
        by_tensor = {id(reader.tensor): reader for reader in readers}
        rows, columns = self.shape[-2:] if len(self.shape) > 1 else (*self.shape, 1, 1)[:2]
        grid = floats(by_tensor[id(self.scales)])
        grid = grid.reshape(-1, grid.shape[-1]) if grid.ndim > 1 else grid.reshape(-1, 1)
        numbers = table("I8" if self.packed else self.codes.dtype)
        zeros = self._zeros(by_tensor[id(self.zeros)], grid.shape) if self.zeros else None
        of_column = np.minimum(np.arange(columns) // self.block[1], grid.shape[1] - 1)
        if self.groups is not None:
            of_column = whole(by_tensor[id(self.groups)], np.int32)
            if of_column.size and (of_column.min() < 0 or of_column.max() >= grid.shape[1]):
                raise unfit(self.groups, self.codes)
        single = grid.size == 1
        per_matrix = -(-rows // self.block[0])
        row_bytes = self.codes.shape[-1] * BITS[self.codes.dtype] // 8 if len(self.codes.shape) > 1 else 1

        def values(first: int, last: int) -> Floats:
            begin, end = first // columns, last // columns
            raw = taken(readers[0], begin * row_bytes, end * row_bytes).reshape(end - begin, row_bytes)
            q = unpacked(raw, self.bits)[:, :columns] if self.packed else numbers.take(raw)
            at = np.arange(begin, end)
            of_row = at // rows * per_matrix + at % rows // self.block[0]
            if single:
                of_row = of_row * 0
            if zeros is not None:
                q = q - zeros[of_row][:, of_column]
            made: Floats = q * grid[of_row][:, of_column]
            return made * np.float32(self.factor) if self.factor != 1 else made

        return values

    def _zeros(self, reader: Reader, shape: tuple[int, ...]) -> Floats:
        if not self.packed:
            zeros: Floats = table(reader.tensor.dtype)[whole(reader)].reshape(shape)
            return zeros
        words = np.ascontiguousarray(whole(reader, np.int32).T)
        return unpacked(words.view(np.uint8), self.bits).T[: shape[0]]


def unpacked(raw: Array, bits: int) -> Floats:
    """Codes of 4 or 8 bits out of bytes, uint8 [rows, bytes]: lowest first, less half of their range, float32 [rows, codes]."""
    if bits == 4:
        raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    return raw.astype(np.float32) - np.float32(1 << (bits - 1))
