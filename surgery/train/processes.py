"""Find out how a run was started: directly, by torchrun or by accelerate launch."""

from __future__ import annotations

import os

from surgery.errors import OptionError
from surgery.processes import find_process

TORCHRUN = "torchrun --nproc-per-node N -m surgery train …"


def find(*, fsdp: bool) -> tuple[int, int]:
    """Return the number of processes, and the rank of this one, from 0.

    Raises:
        OptionError: they were not started as a training here needs it.
    """
    import torch

    process = find_process()
    count, rank = (1, 0) if process is None else (process.count, process.rank)
    if count == 1 and torch.cuda.device_count() > 1:
        raise OptionError(
            f"This machine has several GPUs, and one process uses one: start with `{TORCHRUN}`, or choose one with "
            "CUDA_VISIBLE_DEVICES."
        )
    # accelerate launch --cpu names a port for the processes that an MPI would start, and starts one.
    if _is_set("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise OptionError(
            "accelerate launch --cpu starts one process, whatever --num-processes says. Leave --cpu out and add --multi-gpu, "
            "which works without a GPU too, or use torchrun."
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED") or _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise OptionError(f"Training with DeepSpeed or Megatron is not offered. Start with `{TORCHRUN}`.")
    if _is_set("ACCELERATE_USE_FSDP") and not fsdp:
        raise OptionError(
            f"accelerate is configured for FSDP, and its options are not used here: start with `{TORCHRUN}` and add `fsdp`."
        )
    if fsdp and count == 1:
        raise OptionError(f"`fsdp` shares the weights out over several processes: start with `{TORCHRUN}`.")
    return count, rank


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
