"""Codes of 2, 4 or 8 bits in the words of a transposed matrix: what GPTQ and AWQ share.

    W[j, i] = (q[i, j] - z[g(i), j]) · s[g(i), j]

with i the input, j the output and g(i) the group of the input. The product is rounded to the type of s. Rows of W are columns of
what is stored, so the codes of one tensor are in memory as a whole: a quarter of its size in bfloat16 at 4 bits, half at 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import Array, Floats
from surgery.checkpoint.quantized.stored import Values, floats, unfit, whole
from surgery.checkpoint.tensor import Reader, Tensor

# The codes of the outputs [first, last), as numbers: of words int32, float32 [inputs or groups, last - first].
Columns = Callable[[Array, int, int], Floats]


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix [outputs, inputs] whose codes are stored transposed.

    Attributes:
        codes, zeros: the words of the codes and of the zero points.
        scales: [groups, outputs].
        of_input: int32 [inputs], the group of each; None where `group_size` inputs in order are a group.
        columns, zero_columns: unpack the codes and the zero points.
        shape: outputs and inputs.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    of_input: Tensor | None
    columns: Columns
    zero_columns: Columns
    shape: tuple[int, int]
    group_size: int

    @property
    def sources(self) -> tuple[Tensor, ...]:
        found = (self.codes, self.zeros, self.scales, self.of_input)
        return tuple(tensor for tensor in found if tensor is not None)

    def start(self, readers: Sequence[Reader]) -> Values:
        words, zero_words = whole(readers[0], np.uint32), whole(readers[1], np.uint32)
        scales = floats(readers[2])
        inputs = self.shape[1]
        groups = np.arange(inputs) // self.group_size if self.of_input is None else whole(readers[3], np.int32)
        if self.of_input is not None and (groups.min() < 0 or groups.max() >= len(scales)):
            raise unfit(self.of_input, self.codes)

        def values(first: int, last: int) -> Floats:
            begin, end = first // inputs, last // inputs
            q = self.columns(words, begin, end)
            zeros = self.zero_columns(zero_words, begin, end)
            made = (q - zeros[groups]) * scales[groups, begin:end]
            transposed: Floats = np.ascontiguousarray(made.T)
            return transposed.ravel()

        return values
