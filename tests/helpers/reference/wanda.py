"""locuslab/wanda's procedure, written out: what its layer wrapper adds up, and which weights it sets to zero.

One thing is left out: it feeds the pruned layers' outputs to the next layer; here all inputs are those of the whole model. It
prunes W, surgery prunes Δ: `mask` takes either.
"""

from __future__ import annotations

import torch


class WrappedLayer:
    """The running mean, over samples, of the squared norm of each input feature (lib/layerwrapper.py)."""

    def __init__(self, columns: int) -> None:
        self.scaler_row = torch.zeros(columns)
        self.nsamples = 0

    def add_batch(self, inp: torch.Tensor) -> None:
        """inp: [batch, tokens, columns]."""
        batch = inp.shape[0]
        flat = inp.reshape(-1, inp.shape[-1]).t()
        self.scaler_row *= self.nsamples / (self.nsamples + batch)
        self.nsamples += batch
        self.scaler_row += torch.norm(flat.float(), p=2, dim=1) ** 2 / self.nsamples


def mask(weight: torch.Tensor, wrapped: WrappedLayer, sparsity_ratio: float) -> torch.Tensor:
    """True where an entry goes, of each row those that `prune_wanda` (lib/prune.py) sorts to the front."""
    metric = torch.abs(weight) * torch.sqrt(wrapped.scaler_row.reshape((1, -1)))
    goes = torch.zeros_like(metric) == 1
    indices = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * sparsity_ratio)]
    return goes.scatter_(1, indices, True)
