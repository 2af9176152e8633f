"""HMA: which part of the model a tensor belongs to, and the average bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import fine_tuned, tiny_llama
from helpers.reference.formulas import blend, hma_part, same_bits
from helpers.runs import edit

from surgery.errors import OptionError
from surgery.methods.hma import Hma


def alpha_of(name: str, ratios: tuple[float, ...], layers: int) -> float:
    if name.startswith("model.layers."):
        return ratios[hma_part(len(ratios), int(name.split(".")[2]), layers)]
    return ratios[0] if "embed_tokens" in name else ratios[-1]


@pytest.mark.parametrize("layers", [3, 4, 5, 7])
@pytest.mark.parametrize("ratios", [(0.4,), (0.3, 0.2, 0.1), (0.0, 0.5, 1.0), (1.0, 0.25, 0.0)])
def test_each_part_has_its_ratio(ratios: tuple[float, ...], layers: int, tmp_path: Path) -> None:
    pre = tiny_llama(layers=layers, width=8)
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, Hma(ratios))
    for name in ft:
        alpha = alpha_of(name, ratios, layers)
        whole = {0.0: ft, 1.0: pre}.get(alpha)
        assert same_bits(out[name], whole[name] if whole else blend(pre[name], ft[name], alpha)), name


@pytest.mark.parametrize("layers", [3, 4, 22, 32])
def test_three_parts_of_the_layers_written_out(layers: int) -> None:
    from surgery.layout import place
    from surgery.methods.hma import part

    written = {
        3: [0, 1, 2],
        4: [0, 0, 1, 2],
        22: [0] * 8 + [1] * 7 + [2] * 7,
        32: [0] * 11 + [1] * 11 + [2] * 10,
    }[layers]
    places = [place(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(layers)]
    assert [part(where, {where.stack: layers}, 3) for where in places] == written


@pytest.mark.parametrize(
    ("pre_dtype", "ft_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("alpha", [1 / 3, 0.1, 1e-9])
def test_the_average_is_that_of_float32_in_every_type(
    pre_dtype: torch.dtype, ft_dtype: torch.dtype, alpha: float, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 901, generator=generator).to(pre_dtype)  # more than a chunk
    base.flatten()[::5], base.flatten()[1::5] = 0.0, -0.0
    ft = (base + torch.randn(base.shape, generator=generator) / 100).to(ft_dtype)
    ft[::3] = base[::3].to(ft_dtype)
    ft.flatten()[::10] = -0.0
    out = edit(tmp_path, {name: base}, {name: ft}, Hma((alpha,)))[name]
    assert same_bits(out, blend(base, ft, alpha))


def test_float64_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    pre = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ft = pre + 1e-12
    out = edit(tmp_path, {name: pre}, {name: ft}, Hma((0.25,)))[name]
    torch.testing.assert_close(out - pre, torch.full_like(pre, 0.75e-12), rtol=1e-2, atol=0)


def test_more_ratios_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"`ratios` has 3 numbers, but the model has only 2 layers"):
        edit(tmp_path, tiny_llama(), tiny_llama(), Hma((0.3, 0.2, 0.1)))


@pytest.mark.parametrize("ratios", [(), (1.5,), (0.5, -0.1), (float("nan"),)])
def test_ratios_are_checked_by_name(ratios: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="`ratios`"):
        Hma(ratios)
