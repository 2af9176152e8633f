"""Run by torchrun from test_mofo_sharded.py: sharded steps beside those of the whole tensors, in every process."""

from __future__ import annotations

import io
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as whole_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from surgery.errors import OptionError
from surgery.optim import MoFO, mofo
from surgery.optim.update import on_device

LARGEST: list[int] = []  # message of an optimizer's step, in entries
SHAPES = [(7, 5), (3, 6), (9,), (8, 4, 2)]
CASES: list[tuple[torch.dtype, bool, dict[str, Any]]] = [  # and whether gradients are full of ties
    (torch.float32, True, {}),
    (torch.float32, False, {"filter": "gradient", "weight_decay": 0.1}),
    (torch.float32, True, {"filter": "mv"}),
    (torch.float32, True, {"filter": "random", "filter_1d": False}),
    (torch.bfloat16, True, {"rounding": "stochastic"}),
    (torch.bfloat16, False, {"rounding": "master"}),
    (torch.float64, True, {}),
    (torch.float32, False, {"alpha": 1.0}),
    (torch.float32, True, {"form": "gd"}),
    (torch.float32, True, {"blocks": True}),
    (torch.float32, False, {"blocks": True, "filter": "random"}),
]
# Of each tensor of SHAPES: rows, or columns, that take turns.
BLOCKS = [None, (1, ((0, 1), (1, 2))), (0, ((0, 2), (1, 1))), (0, ((2, 1), (0, 2), (1, 1)))]


def same(sharded: Any, whole: torch.Tensor, about: object) -> None:
    assert torch.equal(sharded.full_tensor(), whole), about


def gradient(shape: tuple[int, ...], step: int, ties: bool) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    return (numbers * 1.5).round() / 2 if ties else numbers


def tensors(mesh: Any, placements: list[Any]) -> None:
    """Parameters cut in this way, with gradients full of ties and without."""
    for dtype, ties, options in CASES:
        starts = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in SHAPES]
        cuts = [[Replicate() if p.is_shard() and p.dim >= x.ndim else p for p in placements] for x in starts]
        pieces = [nn.Parameter(distribute_tensor(x.clone(), mesh, cut)) for x, cut in zip(starts, cuts, strict=True)]
        wholes = [nn.Parameter(x.clone()) for x in starts]
        settings = {"lr": 0.01, "alpha": 0.15, **options}
        optimizers = []
        for params in (pieces, wholes):
            blocks = dict(zip(params, BLOCKS, strict=True)) if settings.get("blocks") else None
            optimizers.append(MoFO(params, **{**settings, "blocks": blocks}))
        sharded, single = optimizers
        for step in range(2):
            for piece, whole, cut in zip(pieces, wholes, cuts, strict=True):
                whole.grad = gradient(tuple(whole.shape), step, ties).to(dtype)
                piece.grad = distribute_tensor(whole.grad.clone(), mesh, cut)
            sharded.step()
            single.step()
        for piece, whole in zip(pieces, wholes, strict=True):
            same(piece, whole.detach(), (placements, dtype, ties, options, whole.shape))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        # The same batch in every process, and a power of two of them: their mean is exactly the single process's gradient.
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
        optimizer.step()


def fsdp(mesh: Any) -> None:
    """fully_shard, and the state's way through a whole state dict."""
    plain, model = network(), network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, single = MoFO(model.parameters(), lr=0.01), MoFO(plain.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    train(plain, single, range(3))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        same(one, other.detach(), "fsdp")
        same(optimizer.state[one]["exp_avg"], single.state[other]["exp_avg"], "momentum")
    full = whole_state.StateDictOptions(full_state_dict=True)
    saved = whole_state.get_optimizer_state_dict(model, optimizer, options=full)
    file = io.BytesIO()
    torch.save(saved, file)
    optimizer.zero_grad()
    again = MoFO(model.parameters(), lr=0.01)
    whole_state.set_optimizer_state_dict(model, again, saved, options=full)
    train(model, again, range(3, 5))
    train(plain, single, range(3, 5))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        same(one, other.detach(), "after loading")


def tensor_parallel(mesh: Any) -> None:
    """Columns and rows of a model's matrices in different processes: the step, given the gradients."""
    plain, model = network(), network()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer, single = MoFO(model.parameters(), lr=0.01), MoFO(plain.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.grad = one.grad.full_tensor()  # type: ignore[union-attr]
        optimizer.step()
        single.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        same(one, other.detach(), "tensor parallel")


def watch() -> None:
    """Count what an optimizer's steps send."""
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        LARGEST.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    watch()
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    tensors(line, [Shard(0)])
    fsdp(line)
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
        tensors(square, [Shard(0), Shard(1)])
        tensors(square, [Replicate(), Shard(0)])
    else:
        tensors(line, [Shard(1)])
        tensor_parallel(line)
        refused(line)
        # What accelerators run, with the CPU in their place.
        vars(mofo)["on_cpu"] = lambda update, each: on_device(update)
        tensors(line, [Shard(0)])
    assert LARGEST
    assert max(LARGEST) == 2048, "nothing is exchanged but histograms"
    dist.destroy_process_group()


def refused(mesh: Any) -> None:
    """FSDP1 flattens."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for keep in (True, False):
        wrapped = FullyShardedDataParallel(network(), use_orig_params=keep, device_id=torch.device("cpu"))
        try:
            MoFO(wrapped.parameters()).step()
        except OptionError as error:
            assert "fully_shard" in str(error)  # noqa: PT017
        else:
            raise AssertionError("FSDP1 was not refused")


if __name__ == "__main__":
    main()
    sys.exit(0)
