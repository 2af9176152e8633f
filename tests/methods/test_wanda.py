"""Wanda's choice, given norms, against loops over rows written out; the norms themselves are tested in tests/calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, tiny_llama
from helpers.reference.formulas import kept, pruned, same_bits, task_vector
from helpers.runs import edit
from numpy.typing import NDArray

from surgery.engines import rows
from surgery.errors import OptionError
from surgery.methods.wanda import Norm, Wanda

Q, DOWN, EMBEDDING = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.embed_tokens.weight",
)
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


def norms_of(tensors: Tensors, *, transposed: bool = False, seed: int = 3) -> dict[str, Norm]:
    """Random norms for every matrix but the embedding."""
    draw = np.random.default_rng(seed)
    return {
        name: Norm(draw.uniform(0.01, 10, tensor.shape[0 if transposed else 1]).astype(np.float32), transposed, 1)
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name != EMBEDDING
    }


def literal(
    pre: torch.Tensor, ft: torch.Tensor, norms: NDArray[np.float32], sparsity: float, group: str, transposed: bool
) -> torch.Tensor:
    """METHODS, one row after the other."""
    if transposed:
        return literal(pre.T.contiguous(), ft.T.contiguous(), norms, sparsity, group, False).T.contiguous()
    if group == "tensor":
        return pruned(pre, ft, kept(abs(task_vector(pre, ft)) * np.tile(norms, len(pre)), sparsity))
    return torch.stack(
        [pruned(p, f, kept(abs(task_vector(p, f)) * norms, sparsity)) for p, f in zip(pre, ft, strict=True)]
    )


@pytest.mark.parametrize("chunk", [1 << 18, 100])
@pytest.mark.parametrize("group", ["row", "tensor"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "float32 bfloat16", "float16 float32"])
def test_against_the_formula(
    dtypes: str, transposed: bool, group: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK", chunk)
    pre_type, ft_type = (getattr(torch, name) for name in dtypes.split())
    pre = tiny_llama(pre_type)
    ft = {name: tensor.to(ft_type) for name, tensor in fine_tuned(pre).items()}
    norms = norms_of(pre, transposed=transposed)
    for sparsity in (0.3, 0.9):
        out = edit(tmp_path / str(sparsity), pre, ft, Wanda(sparsity, group=group, norms=norms))
        for name, found in norms.items():
            wanted = literal(pre[name], ft[name], found.values, sparsity, group, transposed)
            assert same_bits(out[name], wanted), name
        ones = np.ones(16, np.float32)
        assert same_bits(out[EMBEDDING], literal(pre[EMBEDDING], ft[EMBEDDING], ones, sparsity, group, False))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_and_one_that_saw_no_token(transposed: bool, tmp_path: Path) -> None:
    pre = tiny_llama() | {STACKED: torch.randn(3, 8, 16).bfloat16()}
    ft = fine_tuned(pre, scale=0.1)
    values = np.random.default_rng(0).uniform(0.01, 10, (3, 8 if transposed else 16)).astype(np.float32)
    values[1] = 0
    norms = {STACKED: Norm(values, transposed, np.array([5, 0, 2]))}
    out = edit(tmp_path, pre, ft, Wanda(0.5, norms=norms))
    values[1] = 1
    for expert in range(3):
        wanted = literal(pre[STACKED][expert], ft[STACKED][expert], values[expert], 0.5, "row", transposed)
        assert same_bits(out[STACKED][expert], wanted)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("group", ["row", "tensor"])
def test_the_ends(sparsity: float, group: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, Wanda(sparsity, group=group, norms=norms_of(pre)))
    side = pre if sparsity else ft
    assert all(same_bits(out[name], (side if tensor.ndim == 2 else ft)[name]) for name, tensor in pre.items())


@pytest.mark.parametrize("shape", [(8,), (17,), (2, 16)])
def test_norms_that_do_not_fit_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    norms: dict[str, Any] = {Q: Norm(np.ones(shape, np.float32), False, 1)}
    with pytest.raises(OptionError, match=f"norms of {Q}"):
        edit(tmp_path, tiny_llama(), fine_tuned(tiny_llama()), Wanda(norms=norms))


def test_a_large_matrix_needs_its_threshold_bracketed(tmp_path: Path) -> None:
    """More entries than the sample holds."""
    draw = torch.Generator().manual_seed(0)
    pre = {DOWN: torch.randn(300, 2000, generator=draw).bfloat16()}
    ft = fine_tuned(pre)
    norms = norms_of(pre)
    out = edit(tmp_path, pre, ft, Wanda(0.9, group="tensor", norms=norms))
    assert same_bits(out[DOWN], literal(pre[DOWN], ft[DOWN], norms[DOWN].values, 0.9, "tensor", False))
