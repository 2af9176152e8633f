"""LiNeS: the factor of each layer, and the scaled task vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import fine_tuned, tiny_llama
from helpers.reference.formulas import blend, same_bits
from helpers.runs import edit

from surgery.errors import OptionError
from surgery.methods.lines import Lines

OUTSIDE = {
    "ends": {"model.embed_tokens.weight": "alpha", "model.norm.weight": "one", "lm_head.weight": "one"},
    "alpha": dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), "alpha"),
    "ft": dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), "one"),
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("layers", [2, 5])
def test_each_layer_has_its_factor(layers: int, alpha: float, outside: str, tmp_path: Path) -> None:
    """λ_l = α + (1 − α) · l / (L − 1), and out = pre + λ_l · Δ; the ends are stored bits."""
    pre = tiny_llama(layers=layers, width=8)
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, Lines(alpha, outside))
    for name in ft:
        if name.startswith("model.layers."):
            factor = alpha + (1 - alpha) * (int(name.split(".")[2]) / (layers - 1))
        else:
            factor = {"alpha": alpha, "one": 1.0}[OUTSIDE[outside][name]]
        ends = {0.0: pre, 1.0: ft}.get(factor)
        assert same_bits(out[name], ends[name] if ends else blend(pre[name], ft[name], 1 - factor)), name


def test_the_average_is_the_scaled_task_vector(tmp_path: Path) -> None:
    """In float64, where no rounding hides a wrong sign or side."""
    pre = tiny_llama(torch.float64, layers=3)
    ft = {name: tensor + torch.randn_like(tensor) / 100 for name, tensor in pre.items()}
    out = edit(tmp_path, pre, ft, Lines(0.1))
    for layer, factor in enumerate((0.1, 0.55, 1.0)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(out[name], pre[name] + factor * (ft[name] - pre[name]), rtol=0, atol=1e-15)


def test_one_layer_is_the_last(tmp_path: Path) -> None:
    pre = tiny_llama(layers=1)
    ft = fine_tuned(pre)
    out = edit(tmp_path, pre, ft, Lines())
    assert [name for name in ft if same_bits(out[name], pre[name])] == ["model.embed_tokens.weight"]
    assert all(same_bits(out[name], ft[name]) for name in ft if "embed" not in name)


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 4)}
    with pytest.raises(OptionError, match="no depth"):
        edit(tmp_path, tensors, tensors, Lines())


@pytest.mark.parametrize(
    ("alpha", "outside", "name"), [(1.5, "ft", "alpha"), (float("nan"), "ft", "alpha"), (0.5, "x", "outside")]
)
def test_options_are_checked_by_name(alpha: float, outside: str, name: str) -> None:
    with pytest.raises(OptionError, match=f"`{name}`"):
        Lines(alpha, outside)
