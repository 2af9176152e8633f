"""Salience against a literal float64 version and against mergekit's `arcee_fusion`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama
from helpers.mergekit import mergekit, needs_mergekit
from helpers.reference.formulas import pruned, salience_limit, salience_score, same_bits
from helpers.runs import BF16, F16, F32, F64, edit

from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.errors import OptionError
from surgery.methods import Salience

NAME = "model.layers.{}.self_attn.q_proj.weight"


def pair(pre_dtype: torch.dtype, ft_dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensors, Tensors]:
    """Rows that moved far and rows that hardly did, and some entries that did not."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(shape, dtype=F64, generator=generator)
    reach = torch.rand(*shape[:-1], 1, dtype=F64, generator=generator)
    ft = pre + 0.2 * reach * torch.randn(shape, dtype=F64, generator=generator)
    ft[..., ::5] = pre[..., ::5]
    return {NAME.format(0): pre.to(pre_dtype)}, {NAME.format(0): ft.to(ft_dtype)}


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5])
@pytest.mark.parametrize(
    ("dtypes", "shape"),
    [
        ((F32, F32), (1, 1)),
        ((F32, F32), (1, 300)),
        ((BF16, BF16), (60, 37)),
        ((F16, F32), (4, 30, 11)),
        ((F32, BF16), (1031, 523)),  # more than a sample, in several chunks
        ((F64, F64), (3, 300_001)),  # a row is more than a chunk
    ],
    ids=str,
)
def test_what_stands_out_is_kept(
    dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...], threshold: float, tmp_path: Path
) -> None:
    """Bit for bit, but for the entries whose score is the threshold's up to the rounding of the divergence to float32."""
    pre, ft = pair(*dtypes, shape)
    (out,) = edit(tmp_path, pre, ft, Salience(threshold)).values()
    (base,), (tuned,) = pre.values(), ft.values()
    score = salience_score(base, tuned)
    limit = salience_limit(score, threshold)
    keep, close = score >= limit, abs(score - limit) <= 1e-6 * np.sort(score)[score.size * 3 // 4]
    expected = pruned(base, tuned, keep)
    differs = (out != expected).flatten().numpy()
    assert not (differs & ~close).any()
    if score.size > 1:
        assert 0.002 < keep.mean() < 0.9, "the case says something"
        assert close.mean() < 0.01
    if not close.any():
        assert same_bits(out, expected)


def test_a_tensor_that_hardly_moved_keeps_all_that_did(tmp_path: Path) -> None:
    pre = {NAME.format(0): torch.randn(20, 50, generator=torch.Generator().manual_seed(0))}
    ft = {name: tensor.clone() for name, tensor in pre.items()}
    ft[NAME.format(0)][3, :7] += 1
    assert same_bits(edit(tmp_path, pre, ft, Salience())[NAME.format(0)], ft[NAME.format(0)])


@needs_mergekit
def test_mergekit_keeps_the_same(tmp_path: Path) -> None:
    """Its `arcee_fusion`, in float64; it adds 10⁻⁸ to the probabilities, which may move an entry at the threshold."""
    pre = tiny_llama(F64, width=20)
    ft = fine_tuned(pre)
    theirs = mergekit(tmp_path, pre, [ft], "arcee_fusion", "float64", weights={})
    run(prepare(tmp_path / "pre", tmp_path / "ft0", Salience(), out=tmp_path / "ours"))
    ours = read_checkpoint(tmp_path / "ours")
    for name in (name for name in ours if ours[name].dim() == 2):
        score = salience_score(pre[name], ft[name])
        close = abs(score - salience_limit(score, 1.5)) <= 1e-4 * score.max()
        differs = ((ours[name] != pre[name]) != (theirs[name] != pre[name])).flatten().numpy()
        assert not (differs & ~close).any()
        assert close.sum() <= 2
        assert 0.02 < (theirs[name] != pre[name]).double().mean() < 0.3


def test_the_threshold_is_checked() -> None:
    with pytest.raises(OptionError, match="`threshold`"):
        Salience(float("nan"))
