"""FAPM, magnitude, relative change and breadcrumbs: the files that a run writes, bit for bit against `reference.formulas`.

All cases of a kind are tensors of one checkpoint, so that a run answers for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.mergekit import mergekit, needs_mergekit
from helpers.reference.formulas import F32 as F32Array
from helpers.reference.formulas import SCORES, exact, fapm_score, fapm_score64, kept, pruned, same_bits
from helpers.runs import MAKE

from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods import Breadcrumbs, Relative

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SPARSITIES = (0.0, 0.001, 0.5, 0.9, 0.999, 1.0)
# Above the size up to which a whole tensor is its own sample, in three chunks of which the last is odd.
LARGE = (1031, 523)


def normal(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pre = 0.05 * torch.randn(shape, dtype=F64, generator=generator)
    return pre, pre + 0.002 * torch.randn(shape, dtype=F64, generator=generator)


def ties(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant |Δ|, and in pre two values: whole score levels are tied."""
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    pre = 0.5 + 0.25 * signs.roll(1)
    return pre, pre + signs / 64


def still(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ = 0 in nine entries of ten."""
    pre, ft = normal(shape, seed)
    return pre, torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.9, pre, ft)


def zeros(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """0 and −0 in pre: many in the first half, few in the second, some of them with Δ = 0."""
    pre, ft = normal(shape, seed)
    dice = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    dice.flatten()[dice.numel() // 2 :].sqrt_()
    pre = torch.where(dice < 0.1, 0.0, torch.where(dice < 0.15, -0.0, pre))
    return pre, torch.where(dice < 0.05, pre, torch.where(dice < 0.06, -pre, ft))


def few_zeros(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_pre = 0 about twice as often as a sparsity of 0.001 prunes: the threshold is −∞, in a thin tail."""
    pre, ft = normal(shape, seed)
    pre[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.002] = 0
    return pre, ft


def subnormal(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Below the least normal number of both float16 and (the second half) bfloat16 and float32."""
    pre, ft = normal(shape, seed)
    scale = torch.full((pre.numel(),), 1e-5, dtype=F64)
    scale[pre.numel() // 2 :] = 1e-38
    return pre * scale.view(shape), ft * scale.view(shape)


KINDS = {kind.__name__: kind for kind in (normal, ties, still, zeros, few_zeros, subnormal)}
SAME = [(dtype, dtype) for dtype in (BF16, F16, F32, F64)]
# A float16 that is cast to from float64 is left out: torch rounds twice there.
MIXED = [
    (F32, BF16),
    (BF16, F32),
    (F16, BF16),
    (BF16, F16),
    (F32, F16),
    (F64, F32),
    (F64, BF16),
    (F32, F64),
    (F16, F64),
]


def cases(size: str) -> tuple[Tensors, Tensors, dict[str, str]]:
    """pre and ft, and what each tensor's name stands for."""
    if size == "small":
        table = [(kind, shape, dtypes) for kind in KINDS for shape in ((1, 1), (1, 257), (333, 7)) for dtypes in SAME]
        table += [(kind, (61, 37), dtypes) for kind in KINDS for dtypes in MIXED]
    else:
        table = [(kind, LARGE, (BF16, BF16)) for kind in KINDS]
        table += [("normal", LARGE, dtypes) for dtypes in (*SAME[1:], (F32, BF16), (BF16, F64))]
        table += [("few_zeros", LARGE, (F32, F32)), ("zeros", LARGE, (F32, F16)), ("normal", (131_073, 1), (F32, F32))]
    pre: Tensors = {}
    ft: Tensors = {}
    legend = {}
    for number, (kind, shape, (pre_dtype, ft_dtype)) in enumerate(table):
        name = f"model.layers.{number}.self_attn.q_proj.weight"
        one, other = KINDS[kind](shape, number)
        pre[name], ft[name] = one.to(pre_dtype), other.to(ft_dtype)
        legend[name] = f"{kind} {shape} {pre_dtype}->{ft_dtype}"
    return pre, ft, legend


@dataclass
class Case:
    """A tensor of the checkpoint: what it stands for, both sides, and its score by each method."""

    legend: str
    pre: torch.Tensor
    ft: torch.Tensor
    scores: dict[str, F32Array]


@pytest.fixture(scope="module", params=["small", "large"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    folder = tmp_path_factory.mktemp(request.param)
    pre, ft, legend = cases(request.param)
    write_checkpoint(folder / "pre", pre, shards=2)
    write_checkpoint(folder / "ft", ft, shards=3)
    return folder, {
        name: Case(
            legend[name], pre[name], ft[name], {key: score(pre[name], ft[name]) for key, score in SCORES.items()}
        )
        for name in ft
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", SCORES)
def test_the_files_hold_the_bits_that_the_formula_chooses(
    pair: tuple[Path, dict[str, Case]], method: str, sparsity: float, tmp_path: Path
) -> None:
    folder, table = pair
    run(prepare(folder / "pre", folder / "ft", MAKE[method](sparsity=sparsity), out=tmp_path / "out"))
    out = read_checkpoint(tmp_path / "out")
    assert out.keys() == table.keys()
    wrong = [
        case.legend
        for name, case in table.items()
        if not same_bits(out[name], pruned(case.pre, case.ft, kept(case.scores[method], sparsity)))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("sparsity", "top"), [(0.9, 0.01), (0.0, 0.01), (0.5, 0.5), (0.3, 0.6), (0.2, 0.9), (0.5, 0.0)]
)
def test_breadcrumbs_go_at_both_ends(
    pair: tuple[Path, dict[str, Case]], sparsity: float, top: float, tmp_path: Path
) -> None:
    folder, table = pair
    run(prepare(folder / "pre", folder / "ft", Breadcrumbs(sparsity, top), out=tmp_path / "out"))
    out = read_checkpoint(tmp_path / "out")
    wrong = [
        case.legend
        for name, case in table.items()
        if not same_bits(out[name], pruned(case.pre, case.ft, kept(case.scores["magnitude"], sparsity, top)))
    ]
    assert wrong == []


@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.9])
def test_large_changes_of_small_weights_go(pair: tuple[Path, dict[str, Case]], sparsity: float, tmp_path: Path) -> None:
    folder, table = pair
    run(prepare(folder / "pre", folder / "ft", Relative(sparsity, "high"), out=tmp_path / "out"))
    out = read_checkpoint(tmp_path / "out")
    wrong = [
        case.legend
        for name, case in table.items()
        if not same_bits(out[name], pruned(case.pre, case.ft, kept(case.scores["relative"], 0.0, sparsity)))
    ]
    assert wrong == []


@needs_mergekit
@pytest.mark.parametrize(("sparsity", "top"), [(0.9, 0.01), (0.5, 0.05)])
def test_mergekit_keeps_the_same_breadcrumbs(sparsity: float, top: float, tmp_path: Path) -> None:
    """Its density is what is left at both ends. Of float32 tensors without ties, whose sizes both shares divide.

    It cuts density · n down to a whole number: hence the little that is added.
    """
    pre = tiny_llama(F32, width=20)
    ft = fine_tuned(pre)
    weights = {"density": 1 - sparsity - top + 1e-9, "gamma": top, "weight": 1.0}
    theirs = mergekit(tmp_path, pre, [ft], "breadcrumbs", weights=weights)
    run(prepare(tmp_path / "pre", tmp_path / "ft0", Breadcrumbs(sparsity, top), out=tmp_path / "ours"))
    ours = read_checkpoint(tmp_path / "ours")
    for name in (name for name in ours if ours[name].dim() == 2):
        assert torch.equal(ours[name] != pre[name], theirs[name] != pre[name]), name
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8), name


@pytest.mark.parametrize("kind", KINDS)
def test_float32_scores_choose_as_float64_but_for_rounding_at_the_threshold(kind: str) -> None:
    pre, ft = (tensor.to(BF16) for tensor in KINDS[kind]((333, 71), 5))
    score, score32 = fapm_score64(pre, ft), fapm_score(pre, ft).astype(float)
    delta, weight = abs(exact(ft) - exact(pre)), abs(exact(pre))
    with np.errstate(all="ignore"):
        rounding = 2.0**-22 * (delta + weight.mean() * delta / weight) + 2.0**-149 * (1 + 1 / weight)
    rounding[delta == 0] = 0
    finite = np.isfinite(score)
    assert (finite == np.isfinite(score32)).all()
    assert (abs(score32[finite] - score[finite]) <= rounding[finite]).all()
    for sparsity in (0.001, 0.5, 0.9, 0.999):
        differs = kept(score32, sparsity) != kept(score, sparsity)
        t, t32 = (np.sort(values)[round(sparsity * score.size) - 1] for values in (score, score32))
        slack = 0.0 if t == t32 else abs(t32 - t)
        assert (abs(score[differs] - t) <= rounding[differs] + slack).all()
