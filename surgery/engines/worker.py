"""The buffers of one thread of the CPU engine, and where it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import Array, narrow, widen
from surgery.checkpoint.tensor import Sink, Tensor
from surgery.engines.chunks import CHUNK, Chunks
from surgery.engines.results import Result
from surgery.errors import CheckpointError
from surgery.methods.actions import Keep, Step


class Shifted:
    """A part of a sink, from a byte on."""

    def __init__(self, sink: Sink, begin: int) -> None:
        self.sink, self.begin = sink, begin

    def write(self, offset: int, data: Any) -> None:
        """Put bytes at an offset from the part's first byte."""
        self.sink.write(self.begin + offset, data)


class Worker:
    """One thread's buffers.

    Args:
        tick: called with the number of bytes that were read; may raise to stop the work.
        allow_nonfinite: let NaN and Inf of an edited tensor pass.
    """

    def __init__(self, tick: Callable[[int], None], *, allow_nonfinite: bool = False) -> None:
        self.tick, self.allow_nonfinite = tick, allow_nonfinite
        self.chunks = Chunks(tick)
        self.output = bytearray(8 * CHUNK)

    def out(self, tuned: Array) -> Array:
        """A chunk to write, of tuned's type and length; the next one overwrites it."""
        return np.frombuffer(self.output, tuned.dtype, len(tuned))

    def cast(self, base: Array, pre: Tensor, ft: Tensor) -> Array:
        """A raw chunk of pre in ft's type.

        Raises:
            CheckpointError: a number does not fit.
        """
        if pre.dtype == ft.dtype:
            return base
        cast = narrow(widen(pre.dtype, base), ft.dtype)
        if not self.allow_nonfinite and not np.isfinite(widen(ft.dtype, cast)).all():
            raise CheckpointError(
                f"{pre.path}: {pre.name} holds NaN, Inf, or a number too large for ft's {ft.dtype}. Repair it, or allow it with "
                "`allow_nonfinite`."
            )
        return cast


def checked(step: Step, result: Result, *, allow_nonfinite: bool) -> Result:
    """The result, with a note where NaN or Inf was met.

    Raises:
        CheckpointError: it was met in a tensor that is edited.
    """
    sums = (result.before2 or 0.0) + (result.weight2 or 0.0)
    result.nonfinite = result.nonfinite or not np.isfinite(sums)
    if result.nonfinite and not allow_nonfinite and step.pre and not isinstance(step.action, Keep):
        raise CheckpointError(
            f"{step.ft.name} holds NaN or Inf, in {step.ft.path} or in {step.pre.path}. Repair it, or allow it with "
            "`allow_nonfinite`."
        )
    return result
