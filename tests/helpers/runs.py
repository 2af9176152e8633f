"""Runs of a method, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods import METHODS, Method

WEIGHT = "model.layers.0.self_attn.q_proj.weight"

# Options that make each method do something on a tiny pair.
METHOD_OPTIONS: dict[str, list[str]] = {
    "fapm": [],
    "magnitude": ["--sparsity", "0.5", "--rest", "pre"],
    "relative": ["--sparsity", "0.5", "--end", "high"],
    "breadcrumbs": ["--sparsity", "0.5", "--top", "0.1"],
    "salience": ["--threshold", "0.5"],
    "half-reset": ["--seed", "3"],
    "hma": ["--ratios", "0.3,0.1"],
    "lines": ["--alpha", "0.2"],
    "dg-hard": ["--scale", "0.8"],
    "intruder": ["--epsilon", "0.99"],
    "ties": ["--sparsity", "0.7", "--lam", "0.8"],
    "dare": ["--drop-rate", "0.6"],
}

# The registry, for calls with any options.
MAKE: dict[str, Callable[..., Method]] = {**METHODS}


def edit(folder: Path, pre: Tensors, ft: Tensors, method: Method, *, shards: int = 1, **options: Any) -> Tensors:
    """Write both sides into `folder`, run the method there, and read the result."""
    write_checkpoint(folder / "pre", pre, shards=shards)
    write_checkpoint(folder / "ft", ft, shards=shards)
    run(prepare(folder / "pre", folder / "ft", method, out=folder / "out"), **options)
    return read_checkpoint(folder / "out")


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def merged(folder: Path, pre: Tensors, fts: list[Tensors], method: Any, **options: Any) -> Tensors:
    """Write all sides, merge them, and read the result."""
    write_checkpoint(folder / "pre", pre)
    for number, ft in enumerate(fts):
        write_checkpoint(folder / f"ft{number}", ft, shards=1 + number)
    run(
        prepare(folder / "pre", [folder / f"ft{number}" for number in range(len(fts))], method, out=folder / "out"),
        **options,
    )
    return read_checkpoint(folder / "out")


def models(dtypes: tuple[torch.dtype, ...], count: int, *, large: bool = False) -> tuple[Tensors, list[Tensors]]:
    """pre in the first dtype, and fine-tunes in the others in turn, with zeros, ties, and votes that cancel."""
    base = tiny_llama(F64)
    if large:  # three chunks, of which the last is odd
        base = {WEIGHT: 0.05 * torch.randn(1031, 523, dtype=F64, generator=torch.Generator().manual_seed(0))}
    fts = [fine_tuned(base, seed=seed) for seed in range(1, count + 1)]
    for tensors in (base, *fts):
        for tensor in tensors.values():
            tensor.flatten()[::17], tensor.flatten()[5::19] = 0.0, -0.0
    for name, tensor in base.items():
        for number, ft in enumerate(fts):
            flat = ft[name].flatten()
            flat[1::7] = tensor.flatten()[1::7]
            flat[2::13] = tensor.flatten()[2::13].float().double() + (-1) ** number / 32
    pre = {name: tensor.to(dtypes[0]) for name, tensor in base.items()}
    kinds = [dtypes[1 + number % (len(dtypes) - 1)] for number in range(count)]
    return pre, [{name: tensor.to(kind) for name, tensor in ft.items()} for ft, kind in zip(fts, kinds, strict=True)]
