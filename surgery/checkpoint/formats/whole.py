"""Changes of a weight of which no part can be computed by itself: the weight, or the change, is in memory as a whole.

    PiSSA   W − s · B₀·A₀ with B₀·A₀ of the r largest singular values of W     (Meng et al., arXiv 2404.02948, Eqs. 2–4)
    OLoRA   W − s · B₀·A₀ with B₀ = Q[:, :r], A₀ = R[:r], W = Q·R                (Büyükakyüz, arXiv 2406.01775)
    LoRA of a convolution's kernel, whose products torch sums in an order of its own
    FourierFT  W + s · Re(F⁻¹(E))  with E sparse                                     (Gao et al., arXiv 2405.03003, Eqs. 2–4)

With PiSSA and OLoRA peft takes B₀·A₀ out of the base when it loads an adapter, as it did before training.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from surgery.checkpoint.dtypes import RAW, Floats, widen
from surgery.checkpoint.formats.low_rank import LoadedLowRank, numbers
from surgery.checkpoint.tensor import Tensor, read_bytes


class Principal:
    """−s · B₀·A₀ of a weight, found once for each process and kept: it is as large as the adapter's factors.

    Args:
        weight: a matrix.
        kind: "pissa" or "olora".
        scale: s.
        transposed: the weight is stored as [in, out].
    """

    def __init__(self, weight: Tensor, kind: str, rank: int, scale: float, transposed: bool) -> None:
        self.weight, self.kind, self.rank, self.scale, self.transposed = weight, kind, rank, scale, transposed
        self.lock, self.made = threading.Lock(), None

    made: tuple[Floats, Floats] | None

    def load(self) -> LoadedLowRank:
        with self.lock:
            if self.made is None:
                a, b = self._decompose()
                left = -(np.float32(self.scale) * b)
                self.made = (np.ascontiguousarray(a.T), left.T) if self.transposed else (left, a)
        return LoadedLowRank(*self.made, 1.0)

    def _decompose(self) -> tuple[Floats, Floats]:
        """A₀ [r, in] and B₀ [out, r], by the calls that peft makes."""
        import torch

        raw = np.frombuffer(read_bytes(self.weight), RAW[self.weight.dtype])
        weight = torch.from_numpy(widen(self.weight.dtype, raw).astype(np.float32).reshape(self.weight.shape))
        weight = weight.T if self.transposed else weight
        if self.kind == "olora":
            q, r = torch.linalg.qr(weight)
            return r[: self.rank].contiguous().numpy(), q[:, : self.rank].contiguous().numpy()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = torch.diag(torch.sqrt(s[: self.rank] / self.scale))
        return (root @ v[: self.rank]).numpy(), (u[:, : self.rank] @ root).numpy()


@dataclass(frozen=True, slots=True)
class Kernel:
    """s · B·A of a convolution: A [r, in, …kernel] and B [out, r, …1]."""

    a: Tensor
    b: Tensor
    scale: float

    def load(self) -> LoadedKernel:
        """Compute it, by the calls that peft makes."""
        import torch
        from torch.nn.functional import conv1d, conv2d, conv3d

        a, b = torch.from_numpy(numbers(self.a)), torch.from_numpy(numbers(self.b))
        convolve = {3: conv1d, 4: conv2d, 5: conv3d}[a.dim()]
        if a.dim() == 4 and a.shape[2:] == (1, 1):
            made = b[:, :, 0, 0] @ a[:, :, 0, 0]
        else:
            made = convolve(a.transpose(0, 1), b).transpose(0, 1)
        return LoadedKernel((made * self.scale).reshape(b.shape[0], -1).numpy())


@dataclass(frozen=True, slots=True)
class Fourier:
    """FourierFT's change of a weight: the real part of the inverse Fourier transform of a spectrum, times `scale`.

    Attributes:
        spectrum: the entries of the spectrum that are not 0.
        shape: of the weight.
        seed: by which torch draws where they lie.
        transposed: the weight is stored as [in, out].
    """

    spectrum: Tensor
    shape: tuple[int, ...]
    scale: float
    seed: int
    transposed: bool

    def load(self) -> LoadedKernel:
        """Compute it, by the calls that peft makes."""
        import torch

        rows, columns = reversed(self.shape) if self.transposed else self.shape
        places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(self.seed))
        dense = torch.zeros(rows, columns)
        dense.view(-1)[places[: self.spectrum.entries]] = torch.from_numpy(numbers(self.spectrum))
        made = torch.fft.ifft2(dense).real * self.scale
        return LoadedKernel((made.T if self.transposed else made).contiguous().numpy())


class LoadedKernel:
    """All of it."""

    def __init__(self, numbers: Floats) -> None:
        self.numbers, self.width = numbers, numbers.shape[1]

    def part(self, row: int, rows: int, column: int, columns: int) -> Floats:
        return self.numbers[row : row + rows, column : column + columns].copy()
