"""Adapters in the form of mlx-lm, against its formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, tiny_llama, write_checkpoint
from safetensors.torch import save_file

from surgery.checkpoint.source import open_both
from surgery.checkpoint.tensor import read_bytes
from surgery.errors import CheckpointError

MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def adapter(tmp_path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Tensors, Tensors]:
    base = tiny_llama(torch.float32)
    write_checkpoint(tmp_path / "pre", base)
    factors = {}
    for module in MODULES:
        rows, columns = base[f"{module}.weight"].shape
        factors[f"{module}.lora_a"] = (0.1 * torch.randn(columns, 3)).to(dtype)
        factors[f"{module}.lora_b"] = (0.1 * torch.randn(3, rows)).to(dtype)
    (tmp_path / "ft").mkdir()
    save_file(factors, tmp_path / "ft/adapters.safetensors", {"format": "mlx"})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}, **settings}
    (tmp_path / "ft/adapter_config.json").write_text(json.dumps(config))
    return base, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, factors = adapter(tmp_path, dtype)
    tensors = open_both(str(tmp_path / "pre"), str(tmp_path / "ft"))[1][0].tensors
    for name, tensor in base.items():
        found = torch.frombuffer(bytearray(read_bytes(tensors[name])), dtype=torch.float32).reshape(tensor.shape)
        module = name.removesuffix(".weight")
        if module in MODULES:
            product = factors[f"{module}.lora_a"].double() @ factors[f"{module}.lora_b"].double()
            assert torch.allclose(found.double(), tensor.double() + 20.0 * product.T, atol=1e-6)
        else:
            assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fine_tune_type": "vera"}, "mlx_lm.fuse"),
        ({"lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16.0}}, "Put the product into scale"),
        ({"lora_parameters": {}}, "scale"),
        ({"lora_parameters": None}, "scale"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    adapter(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=says):
        open_both(str(tmp_path / "pre"), str(tmp_path / "ft"))


def put(tmp_path: Path, base: Tensors, factors: Tensors, **settings: Any) -> dict[str, torch.Tensor]:
    """What is read of an adapter on a base."""
    write_checkpoint(tmp_path / "pre", base)
    (tmp_path / "ft").mkdir()
    save_file(factors, tmp_path / "ft/adapters.safetensors", {"format": "mlx"})
    config = {"lora_parameters": {"rank": 3, "scale": 20.0, "alpha": 3.0}, **settings}
    (tmp_path / "ft/adapter_config.json").write_text(json.dumps(config))
    tensors = open_both(str(tmp_path / "pre"), str(tmp_path / "ft"))[1][0].tensors
    return {
        name: torch.frombuffer(bytearray(read_bytes(tensor)), dtype=torch.float32).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def test_dora_scales_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, name = tiny_llama(torch.float32), "model.layers.0.mlp.down_proj"
    rows, columns = base[f"{name}.weight"].shape
    a, b, m = 0.1 * torch.randn(columns, 3), 0.1 * torch.randn(3, rows), torch.rand(rows)
    found = put(tmp_path, base, {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}, fine_tune_type="dora")
    sum = base[f"{name}.weight"].double() + 20.0 * (a.double() @ b.double()).T
    expected = m.double()[:, None] * sum / sum.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-5)


def test_an_embedding_has_its_rows_in_a(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, name = tiny_llama(torch.float32), "model.embed_tokens"
    rows, columns = base[f"{name}.weight"].shape
    a, b = 0.1 * torch.randn(rows, 3), 0.1 * torch.randn(3, columns)
    found = put(tmp_path, base, {f"{name}.lora_a": a, f"{name}.lora_b": b})
    torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + 20.0 * a @ b, atol=1e-5, rtol=1e-5)


def test_experts_that_the_base_has_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_llama(torch.float32)
    base |= {f"model.layers.0.mlp.experts.{number}.up_proj.weight": torch.randn(6, 5) for number in range(4)}
    a, b = 0.1 * torch.randn(4 * 3, 5), 0.1 * torch.randn(4, 6, 3)
    module = "model.layers.0.mlp.switch_mlp.up_proj"
    found = put(tmp_path, base, {f"{module}.lora_a": a, f"{module}.lora_b": b})
    for number in range(4):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        expected = base[name] + 20.0 * b[number] @ a.reshape(4, 3, 5)[number]
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
