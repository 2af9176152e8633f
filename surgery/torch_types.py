"""The floating-point types as torch names them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating-point type that most entries are stored in.

    Raises:
        CheckpointError: there is none.
    """
    entries: dict[str, int] = {}
    for tensor in tensors:
        if tensor.is_float:
            entries[tensor.dtype] = entries.get(tensor.dtype, 0) + tensor.entries
    if not entries:
        raise CheckpointError("The checkpoint holds no floating-point tensor.")
    return DTYPES[max(entries, key=lambda dtype: entries[dtype])]
