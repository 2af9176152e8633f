"""Keep the entries of one tensor whose score stands out: |Δ| times a weight of the row, against the quartiles of the tensor.

The tensor is read three times: for the weights of its rows, for the quartiles, to write.
"""

from __future__ import annotations

import numpy as np

from surgery.checkpoint.dtypes import RAW, Floats, widen
from surgery.checkpoint.tensor import Sink
from surgery.engines import kernels
from surgery.engines.chunks import Sides
from surgery.engines.results import Result, Sums
from surgery.engines.rows import Matrix, nth_scores, stored_rows
from surgery.engines.worker import Worker
from surgery.methods.actions import KeepSalient

QUARTILES = (0.25, 0.5, 0.75)


def keep_salient(worker: Worker, action: KeepSalient, sides: Sides, sink: Sink) -> Result:
    """Write ft where an entry's score is at least median + spread · (Q3 − Q1), else pre.

    Raises:
        CheckpointError: a file ends early, or pre holds a number that does not fit ft's type.
    """
    pre, ft, n = sides.pre, sides.ft, sides.ft.entries
    if n == 0:
        return Sums().result(0, 0)
    height, width = n // ft.shape[-1], ft.shape[-1]
    plain = Matrix(sides, 0, height, width, np.ones((1, 1), np.float32))
    weights = np.concatenate([_weights(action, plain, base, tuned) for _, base, tuned, _ in stored_rows(worker, plain)])
    matrix = Matrix(sides, 0, height, width, weights[:, None])
    low, median, high = nth_scores(worker, matrix, [int(share * (n - 1)) + 1 for share in QUARTILES])
    limit = median + np.float32(action.spread) * (high - low)
    sums, kept, word = Sums(), 0, np.dtype(f"u{RAW[ft.dtype].itemsize}")
    for first, base, tuned, scores in stored_rows(worker, matrix):
        keep = (scores >= limit).ravel()
        # Through integers, since a float copy may quieten a NaN's bits.
        out = np.where(keep, tuned.view(word), worker.cast(base, pre, ft).view(word)).view(tuned.dtype)
        after = kernels.distance(pre.dtype, base, ft.dtype, out)
        sums.add(kernels.distance(pre.dtype, base, ft.dtype, tuned), after.delta2, after.differ)
        kept += int(np.count_nonzero(keep))
        sink.write(first * width * out.itemsize, memoryview(out))
    return sums.result(kept, n - kept)


def _weights(action: KeepSalient, matrix: Matrix, base: np.ndarray, tuned: np.ndarray) -> Floats:
    """The weights of some rows, float32 [rows]."""
    tuned64 = widen(matrix.sides.ft.dtype, tuned).astype(np.float64).reshape(-1, matrix.width)
    base64 = widen(matrix.sides.pre.dtype, base).astype(np.float64).reshape(-1, matrix.width)
    weights: Floats = action.row_weights(tuned64, base64)
    return weights
