"""DG-Hard and intruder reduction, against the singular value decomposition of whole matrices in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reference.formulas import dg_hard, exact, intruder, intruder_vectors, noise_median, same_bits
from helpers.runs import BF16, F16, F32, F64, edit

from surgery.engines import spectral
from surgery.errors import CheckpointError, OptionError
from surgery.methods import DgHard, Intruder
from surgery.methods.dg_hard import median_of_noise, threshold
from surgery.methods.scope import Scope

NAME = "model.layers.0.mlp.up_proj.weight"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"
SHAPES = [(1, 1), (1, 9), (40, 40), (90, 31), (31, 90)]
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F32, BF16), (F16, F32)]
# A cast rounds once, of numbers up to 4.
ROUNDING = {F64: 1e-12, F32: 3e-7, F16: 2e-3, BF16: 1.6e-2}


def pair(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[torch.Tensor, torch.Tensor]:
    """A task vector of three directions and noise."""
    generator = torch.Generator().manual_seed(shape[-1])
    *_, m, n = shape
    pre = torch.randn(shape, dtype=F64, generator=generator) / 2
    strong = [torch.randn(*shape[:-2], size, 3, dtype=F64, generator=generator) for size in (m, n)]
    delta = strong[0] @ strong[1].mT / max(m, n) ** 0.5 + 0.02 * torch.randn(shape, dtype=F64, generator=generator)
    return pre.to(dtypes[0]), (pre + delta).to(dtypes[1])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of each matrix."""
    monkeypatch.setattr(spectral, "BLOCK", 300)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_singular_values_of_the_task_vector_go(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    pre, ft = pair(shape, dtypes)
    out = edit(tmp_path, {NAME: pre}, {NAME: ft}, DgHard())[NAME]
    expected = dg_hard(pre, ft, 1.0)
    assert abs(exact(out).reshape(shape) - expected).max() <= ROUNDING[dtypes[1]]
    if min(shape) > 9 and dtypes == (F64, F64):
        assert np.linalg.matrix_rank(exact(out).reshape(shape) - exact(pre).reshape(shape), 1e-6) == 3


@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_the_scale_multiplies_the_threshold(scale: float, tmp_path: Path) -> None:
    pre, ft = pair((31, 90), (F64, F64))
    out = edit(tmp_path, {NAME: pre}, {NAME: ft}, DgHard(scale))[NAME]
    assert abs(out.numpy() - dg_hard(pre, ft, scale)).max() < 1e-12
    assert abs(out.numpy() - dg_hard(pre, ft, 1.0)).max() > 1e-3


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_median_of_noise_is_that_of_the_law(beta: float) -> None:
    assert median_of_noise(beta) == pytest.approx(noise_median(beta), rel=1e-5)


@pytest.mark.parametrize(("height", "width", "value"), [(100, 100, 2.8582), (20, 2, 1.6089), (5, 100, 1.5194)])
def test_the_threshold_is_that_of_gavish_and_donohos_table(height: int, width: int, value: float) -> None:
    """arXiv 1305.5870, Table IV, whose own medians are good to about 10⁻⁴."""
    assert threshold(height, width) == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("epsilon", [0.5, 0.99])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_intruders_are_scaled_down(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], epsilon: float, tmp_path: Path
) -> None:
    pre, ft = pair(shape, dtypes)
    pre, ft = pre / 8, ft / 8 + (ft - pre.to(ft.dtype))  # strong enough to lead
    out = edit(tmp_path, {NAME: pre}, {NAME: ft}, Intruder(0.25, epsilon, 5))[NAME]
    found, *_ = intruder_vectors(pre, ft, 5, epsilon)
    assert abs(exact(out).reshape(shape) - intruder(pre, ft, 5, epsilon, 0.25)).max() <= ROUNDING[dtypes[1]]
    assert same_bits(out, ft) == (not found.any())
    if min(shape) > 9:
        assert found.any()


def test_at_factor_0_an_intruders_direction_is_as_in_pre(tmp_path: Path) -> None:
    pre, ft = pair((50, 30), (F64, F64))
    ft = pre + 5 * (ft - pre)
    found, u, _, v = intruder_vectors(pre, ft, 10, 0.5)
    out = edit(tmp_path, {NAME: pre}, {NAME: ft}, Intruder(0.0))[NAME].numpy()
    assert found.sum() >= 2
    for i in np.flatnonzero(found):
        assert u[:, i] @ out @ v[i] == pytest.approx(u[:, i] @ pre.numpy() @ v[i], abs=1e-10)


def test_stacked_experts_are_a_matrix_each(tmp_path: Path) -> None:
    pre, ft = pair((3, 40, 26), (F64, F64))
    ft[1] = pre[1]  # nothing to shrink
    out = edit(tmp_path / "a", {STACKED: pre}, {STACKED: ft}, DgHard())[STACKED]
    for expert in range(3):
        assert abs(out[expert].numpy() - dg_hard(pre[expert], ft[expert], 1.0)).max() < 1e-12
    assert same_bits(out[1], pre[1])
    out = edit(tmp_path / "b", {STACKED: pre}, {STACKED: ft}, Intruder(0.5))[STACKED]
    for expert in range(3):
        assert abs(out[expert].numpy() - intruder(pre[expert], ft[expert], 10, 0.5, 0.5)).max() < 1e-12


def test_a_convolution_stays(tmp_path: Path) -> None:
    pre = {NAME: torch.randn(8, 8), "model.layers.0.self_attn.conv.weight": torch.randn(4, 3, 3)}
    ft = {name: tensor + 1 for name, tensor in pre.items()}
    out = edit(tmp_path, pre, ft, DgHard(scope=Scope(rest="pre")))
    assert same_bits(out["model.layers.0.self_attn.conv.weight"], ft["model.layers.0.self_attn.conv.weight"])


def test_a_matrix_without_numbers_is_refused_or_stays(tmp_path: Path) -> None:
    pre, ft = pair((20, 30), (F32, F32))
    ft[3, 4] = float("nan")
    for number, method in enumerate((DgHard(), Intruder())):
        with pytest.raises(CheckpointError, match=f"{NAME} holds NaN or Inf"):
            edit(tmp_path / f"refused{number}", {NAME: pre}, {NAME: ft}, method)
        out = edit(tmp_path / f"stays{number}", {NAME: pre}, {NAME: ft}, method, allow_nonfinite=True)
        assert same_bits(out[NAME], ft)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DgHard(-1.0), "scale"),
        (lambda: DgHard(float("nan")), "scale"),
        (lambda: Intruder(1.5), "factor"),
        (lambda: Intruder(epsilon=-0.1), "epsilon"),
        (lambda: Intruder(k=0), "k"),
    ],
)
def test_options_are_checked_by_name(make: object, name: str) -> None:
    assert callable(make)
    with pytest.raises(OptionError, match=f"`{name}`"):
        make()
