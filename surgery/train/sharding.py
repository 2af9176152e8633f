"""Train with the weights sharded over processes, with FSDP2 through accelerate's plugin (`--fsdp`).

Each process holds a part of every tensor, of its gradient and of the optimizer's state, and a layer is put together only while it
computes. MoFO filters the whole logical tensor all the same (`surgery.optim`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the trainer is told. Its states hold whole tensors, as those of one process do.
OPTIONS: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def allow_on_cpu() -> None:
    """Let accelerate shard weights over CPUs too. Call it after making the trainer's arguments, and before the trainer.

    accelerate knows FSDP on accelerators only. Elsewhere it would go on with whole copies and not say so.
    """
    if not torch.accelerator.is_available():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a tensor that every process has as the parameter is sharded, on the parameter's device."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(parameter.device)
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of one that may be sharded; every process must call this."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def gather(model: nn.Module, into: PreTrainedModel) -> PreTrainedModel:
    """Gather the tensors, one after the other, into another model of the same kind. Every process must call this."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some of them together
    places = dict(into.named_parameters())
    for name, parameter in model.named_parameters():
        places[name].copy_(whole(parameter))
    return into
