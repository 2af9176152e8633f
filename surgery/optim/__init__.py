"""Training that forgets less: the optimizer MoFO, and the freezing of half fine-tuning (HFT).

They need torch and nothing else, and fit any training loop that a torch.optim.Optimizer fits.
"""

from __future__ import annotations

from surgery.optim.blocks import fused_blocks
from surgery.optim.half_freeze import Freeze, half_freeze, train_only
from surgery.optim.mofo import MoFO

__all__ = ["Freeze", "MoFO", "fused_blocks", "half_freeze", "train_only"]
