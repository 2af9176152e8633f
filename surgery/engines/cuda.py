"""Edit one tensor on a GPU: the same selection and the same bits as on the processor.

Both sides are copied to the device as a whole, and edited there in chunks (`surgery.engines.resident`). Files are read into two
pinned buffers in turn, so that reading one overlaps with the copy of the other; what is written comes back through the same two,
so that the disk has one chunk while the device makes the next. Each worker has a stream of its own, so that the copies of one
overlap with the arithmetic of another. What needs no arithmetic takes the CPU's way, and so do matrices whose singular values are
edited, in blocks that are multiplied on the device.

Memory on the device, for each worker: the bytes of a tensor of pre and of ft, and about 200 MB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from surgery.checkpoint.dtypes import torch_type
from surgery.checkpoint.tensor import Sink, Tensor
from surgery.engines.cpu import CpuEngine
from surgery.engines.resident import CHUNK, Totals, keeping, slices
from surgery.engines.results import Result
from surgery.engines.worker import checked
from surgery.errors import CheckpointError, OptionError, out_of_memory
from surgery.methods.actions import Blend, Prune, Step
from surgery.methods.hma import blend

STAGING_BYTES = 8 * CHUNK  # of float64


class OnDevice:
    """Linear algebra in torch, on a device: `surgery.engines.spectral.Algebra`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def put(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def take(self, array: torch.Tensor) -> Any:
        return array.cpu().numpy()

    def eigh(self, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors


class CudaEngine:
    """One worker's stream and staging buffers.

    Args:
        tick: called with the number of bytes that were read; may raise to stop the work.
        device: where to compute. Any torch device will do; pinning and streams are used on CUDA.
        allow_nonfinite: let NaN and Inf of an edited tensor pass.
    """

    def __init__(self, tick: Callable[[int], None], device: torch.device, *, allow_nonfinite: bool = False) -> None:
        self.cpu = CpuEngine(tick, allow_nonfinite=allow_nonfinite, algebra=OnDevice(device))
        self.tick, self.device, self.allow_nonfinite = tick, device, allow_nonfinite
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.staging = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]
        self.copied: list[Any] = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []  # type: ignore[no-untyped-call]

    def run(self, step: Step, sink: Sink) -> Result:
        """Carry out a step.

        Raises:
            CheckpointError: a file ends early, or an edited tensor holds NaN or Inf.
            OptionError: the tensor does not fit into the device's memory.
        """
        if step.pre is None or not isinstance(step.action, (Prune, Blend)):
            return self.cpu.run(step, sink)
        try:
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                result = self._edit(step, step.pre, step.action, sink)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise OptionError(
                f"{step.ft.name} does not fit into the memory of {self.device} beside those of the other workers. Give fewer "
                "`workers`, or `device` cpu."
            ) from error
        return self.cpu.add(step, result, sink)

    def _edit(self, step: Step, tensor: Tensor, action: Prune | Blend, sink: Sink) -> Result:
        pre, ft = self._load(tensor), self._load(step.shared)
        totals, turn, waiting = Totals(self.device), 0, None
        groups, size = action.groups if isinstance(action, Prune) else 1, ft.element_size()
        for begin in range(0, len(ft), max(len(ft) // groups, 1)):
            base, tuned = (side[begin : begin + len(ft) // groups] for side in (pre, ft))
            keep = keeping(action, base, tuned) if isinstance(action, Prune) else None
            for at in slices(len(tuned)):
                kept = None if keep is None else keep(at)
                if isinstance(action, Blend):
                    out = blend(_wide(base[at]), _wide(tuned[at]), action.alpha).to(ft.dtype)
                else:
                    out = torch.where(kept, tuned[at], base[at].to(ft.dtype))  # type: ignore[arg-type]
                totals.add(base[at], tuned[at], out, kept)
                part = self._free(turn)[: len(out) * size]
                part.copy_(out.view(torch.uint8), non_blocking=True)
                self._used(turn)
                if waiting:  # written while the device is at work on this chunk
                    self._write(*waiting, sink)
                waiting, turn = (turn, (begin + at.start) * size, part), turn + 1
        if waiting:
            self._write(*waiting, sink)
        result, finite = totals.result(len(ft) if isinstance(action, Prune) else None)
        result = checked(step, result, allow_nonfinite=self.allow_nonfinite)
        if not self.allow_nonfinite and not finite:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} holds a number too large for ft's {step.ft.dtype}. Repair it, or allow it with "
                "`allow_nonfinite`."
            )
        return result

    def _load(self, tensor: Tensor) -> torch.Tensor:
        """The tensor on the device, flat."""
        loaded = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self.device)
        with tensor.open() as reader:
            for turn, start in enumerate(range(0, tensor.nbytes, STAGING_BYTES)):
                part = self._free(turn)[: min(STAGING_BYTES, tensor.nbytes - start)]
                self.tick(reader.fill(start, memoryview(part.numpy()).cast("B")))
                loaded[start : start + len(part)].copy_(part, non_blocking=True)
                self._used(turn)
        return loaded.view(torch_type(tensor.dtype))

    def _write(self, turn: int, offset: int, part: torch.Tensor, sink: Sink) -> None:
        """Write a staging buffer, once what it is to hold has come."""
        self._free(turn)
        sink.write(offset, np.asarray(part.numpy()))

    def _free(self, turn: int) -> torch.Tensor:
        """A staging buffer whose last copy is over."""
        if self.on_gpu:
            self.copied[turn % 2].synchronize()
        return self.staging[turn % 2]

    def _used(self, turn: int) -> None:
        if self.on_gpu:
            self.copied[turn % 2].record(self.stream)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
