"""Edit one tensor on a GPU: the same selection, on whole tensors.

Files are read into two pinned buffers in turn, so that reading one overlaps with the copy of the other to the device; each
worker has a stream of its own, so that the copies of one overlap with the arithmetic of the next. What needs no arithmetic
takes the CPU's way, and so do matrices whose singular values are edited, in blocks that are multiplied on the device.

Memory on the device: about 20 bytes for each entry of the largest tensor and worker.
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
from surgery.engines.results import Result
from surgery.engines.selection import keep_mask
from surgery.engines.worker import checked
from surgery.errors import CheckpointError
from surgery.methods.actions import Blend, Prune, Step
from surgery.methods.hma import blend

STAGING_BYTES = 32 << 20


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
        """
        if step.pre is None or not isinstance(step.action, (Prune, Blend)):
            return self.cpu.run(step, sink)
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            pre, ft = self._load(step.pre), self._load(step.shared)
            kept = None
            if isinstance(step.action, Prune):
                parts = zip(pre.chunk(step.action.groups), ft.chunk(step.action.groups), strict=True)
                keep = torch.cat(
                    [keep_mask(*part, step.action.score, step.action.sparsity, step.action.top) for part in parts]
                )
                kept = int(keep.sum())
                out = torch.where(keep, ft, pre.to(ft.dtype))
            else:
                out = blend(_wide(pre), _wide(ft), step.action.alpha).to(ft.dtype)
            result = Result(
                kept=kept,
                pruned=None if kept is None else ft.numel() - kept,
                differ=int((_wide(out) != _wide(pre)).sum()),
                before2=_square_norm(_wide(ft) - _wide(pre)),
                after2=_square_norm(_wide(out) - _wide(pre)),
                weight2=_square_norm(_wide(pre)),
            )
            result = checked(step, result, allow_nonfinite=self.allow_nonfinite)
            if not self.allow_nonfinite and not bool(torch.isfinite(out).all()):
                raise CheckpointError(
                    f"{step.pre.path}: {step.pre.name} holds a number too large for ft's {step.ft.dtype}. Repair it, or allow "
                    "it with `allow_nonfinite`."
                )
            self._store(out, sink)
        return self.cpu.add(step, result, sink)

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

    def _store(self, out: torch.Tensor, sink: Sink) -> None:
        raw = out.view(torch.uint8)
        for start in range(0, len(raw), STAGING_BYTES):
            part = self._free(0)[: min(STAGING_BYTES, len(raw) - start)]
            part.copy_(raw[start : start + len(part)])
            sink.write(start, np.asarray(part.numpy()))

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


def _square_norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float(), dtype=torch.float64)) ** 2
