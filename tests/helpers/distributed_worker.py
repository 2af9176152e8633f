"""The tensors of a file saved again by torch.distributed.checkpoint, cut over processes in several ways.

Each process takes the file, a folder, its rank and their number. FSDP2 with an optimizer's state, as torch's tutorial has it
(app/); cut along the last dimension, as accelerate lays it (run/pytorch_model_fsdp_0/, with an optimizer beside it).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def module(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module with parameters of these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *outer, leaf = name.split(".")
        at = root
        for step in outer:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


def main(path: str, folder: str, rank: str, processes: str) -> None:
    meeting = Path(folder, "meeting").resolve().as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=int(processes))
    mesh: Any = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = torch.load(path, weights_only=True)
    model = module(tensors)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held, state = get_state_dict(model, optimizer)
    dcp.save({"app": {"model": held, "optim": state}, "step": 3}, checkpoint_id=Path(folder, "app"))
    columns = {
        name: distribute_tensor(tensor, mesh, [Shard(tensor.dim() - 1)]) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }
    dcp.save({"model": columns}, checkpoint_id=Path(folder, "run", "pytorch_model_fsdp_0"))
    dcp.save({"optimizer": state}, checkpoint_id=Path(folder, "run", "optimizer_0"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
