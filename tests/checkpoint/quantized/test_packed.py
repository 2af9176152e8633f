"""GPTQ and AWQ by their published layouts: codes packed literally, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors
from helpers.quantized import layer, opened, same, weight

from surgery.errors import CheckpointError

INPUTS, OUTPUTS, GROUP = 32, 48, 8
NAME = "model.layers.0.mlp.up_proj"
# awq/utils/packing_utils.py: the place of each output of a word, lowest bits first.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def packed(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Codes [rows, columns] as int32 [rows, columns · bits / 32]: of a word's codes the i-th lowest is number order[i]."""
    count = 32 // bits
    order = order or list(range(count))
    words = [
        [
            signed(sum(int(row[begin + number]) << bits * i for i, number in enumerate(order)))
            for begin in range(0, len(row), count)
        ]
        for row in codes
    ]
    return torch.tensor(words, dtype=torch.int32)


def random_parts(bits: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [inputs, outputs], zero points and scales [groups, outputs]."""
    torch.manual_seed(7)
    most, groups = 1 << bits, INPUTS // GROUP
    codes, zeros = torch.randint(0, most, (INPUTS, OUTPUTS)), torch.randint(0, most, (groups, OUTPUTS))
    return codes, zeros, (0.01 * torch.rand(groups, OUTPUTS)).to(dtype)


def literal(q: torch.Tensor, z: torch.Tensor, s: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """W[j, i] = (q[i, j] - z[g(i), j]) · s[g(i), j], rounded to the type of s, then to bfloat16."""
    made = torch.empty(OUTPUTS, INPUTS, dtype=torch.float64)
    for i in range(INPUTS):
        for j in range(OUTPUTS):
            made[j, i] = (int(q[i, j]) - int(z[groups[i], j])) * float(s[groups[i], j])
    return made.to(s.dtype).to(torch.bfloat16)


IN_ORDER = torch.arange(INPUTS) // GROUP


def gptq(bits: int, order: torch.Tensor | None, dtype: torch.dtype = torch.float16) -> Tensors:
    q, z, s = random_parts(bits, dtype)
    parts = {"qweight": packed(q.T, bits).T, "qzeros": packed(z, bits), "scales": s}
    return parts | ({"g_idx": order.to(torch.int32)} if order is not None else {})


def about(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False} | more


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize(
    "order", [None, IN_ORDER, IN_ORDER[torch.randperm(INPUTS)]], ids=["none", "in order", "act order"]
)
def test_gptq(bits: int, layout: str | None, order: torch.Tensor | None, tmp_path: Path) -> None:
    q, z, s = random_parts(bits)
    said = about(bits) | ({"checkpoint_format": layout} if layout else {})
    folder = layer(gptq(bits, order), said, tmp_path / "a")
    expected = literal(q, z if layout == "gptq_v2" else z + 1, s, IN_ORDER if order is None else order)
    assert same(weight(folder, 300), expected)
    assert list(opened(folder).tensors) == [f"{NAME}.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq(dtype: torch.dtype, tmp_path: Path) -> None:
    q, z, s = random_parts(4, dtype)
    parts = {"qweight": packed(q, 4, AWQ_ORDER), "qzeros": packed(z, 4, AWQ_ORDER), "scales": s, "bias": torch.ones(3)}
    folder = layer(parts, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, tmp_path / "a")
    assert same(weight(folder, 300), literal(q, z, s, IN_ORDER))
    assert sorted(opened(folder).tensors) == [f"{NAME}.bias", f"{NAME}.weight"]


def without(part: str) -> Tensors:
    parts = gptq(4, IN_ORDER)
    del parts[part]
    return parts


@pytest.mark.parametrize(
    ("parts", "said", "complaint"),
    [
        (without("scales"), about(4), f"{NAME}.qweight is quantized, and {NAME}.scales, .* is missing"),
        (without("qzeros"), about(4), "qzeros, .* is missing"),
        (without("g_idx"), about(4, group_size=16), "scales of shape .* does not fit"),
        (gptq(4, IN_ORDER[:-1]), about(4), "g_idx of shape .* does not fit"),
        (gptq(4, IN_ORDER), about(8), "does not fit"),
        (gptq(4, IN_ORDER), about(3), "GPTQ in 3 bits"),
        (gptq(4, IN_ORDER), about(4, checkpoint_format="marlin"), "layout marlin"),
        (gptq(4, IN_ORDER), about(4) | {"bits": "four"}, "no whole number as bits"),
        (gptq(4, None), {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemv"}, "layout gemv"),
        (gptq(4, None), {"quant_method": "awq", "bits": 4, "group_size": GROUP}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_named(parts: Tensors, said: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        opened(layer(parts, said, tmp_path / "a"))


def test_groups_that_point_nowhere_are_an_error(tmp_path: Path) -> None:
    folder = layer(gptq(4, IN_ORDER + 1), about(4), tmp_path / "a")
    with pytest.raises(CheckpointError, match="g_idx"):
        weight(folder)
