"""Fine-grained fp8, as transformers writes and loads it, and by the formula."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, read_checkpoint
from helpers.quantized import (
    build,
    edited,
    layer,
    opened,
    plain_twin,
    quantized_copy,
    same,
    same_checkpoint,
    tuned_copy,
    values,
    weight,
)
from transformers import DeepseekV3Config, Qwen3Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from surgery.__main__ import main
from surgery.checkpoint.quantized.scaled import table
from surgery.errors import CheckpointError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "deepseek_v3": DeepseekV3Config(
        **SIZES,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        num_key_value_heads=4,
    ),
}
ABOUT = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
UP = "model.layers.0.mlp.up_proj.weight"


def quantize(name: str, tensor: torch.Tensor) -> Tensors:
    """A projection as transformers quantizes it; the rest as it is."""
    if "_proj" not in name or tensor.dim() != 2:
        return {name: tensor}
    settings = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32)))
    operation: Any = Fp8Quantize
    made: Tensors = operation(settings).convert({name: tensor})
    return made


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A quantized model, a fine-tuned one in bfloat16, and the first as transformers dequantizes it."""
    build(CONFIGS[request.param]).save_pretrained(tmp_path / "plain")
    quantized = quantized_copy(tmp_path / "plain", tmp_path / "fp8", ABOUT, quantize)
    return quantized, tuned_copy(tmp_path / "plain", tmp_path / "ft"), plain_twin(quantized, tmp_path / "twin")


def test_every_tensor_is_what_transformers_loads(pair: tuple[Path, Path, Path]) -> None:
    quantized, _, twin = pair
    checkpoint, expected = opened(quantized), read_checkpoint(twin)
    assert checkpoint.quantized == "fp8"
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(same(values(tensor), expected[name]) for name, tensor in checkpoint.tensors.items())


def test_a_run_writes_what_it_writes_with_the_plain_model(
    pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, ft, twin = pair
    expected = edited(twin, ft, tmp_path / "expected")
    capsys.readouterr()
    found = edited(quantized, ft, tmp_path / "out")
    assert same_checkpoint(found, expected)
    said = " ".join(capsys.readouterr().out.split())
    assert "weights are quantized (fp8): dequantized to BF16" in said


def test_a_quantized_ft_is_written_as_plain_numbers(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    quantized, ft, twin = pair
    assert same_checkpoint(edited(ft, quantized, tmp_path / "out"), edited(ft, twin, tmp_path / "expected"))
    assert same_checkpoint(edited(quantized, quantized, tmp_path / "both"), read_checkpoint(twin))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_is_the_number_that_torch_takes_it_for(kind: torch.dtype) -> None:
    expected = torch.arange(256).to(torch.uint8).view(kind).float()
    found = torch.from_numpy(table("F8_E4M3" if kind == torch.float8_e4m3fn else "F8_E5M2"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def codes(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return (20 * torch.randn(shape)).to(torch.float8_e4m3fn)


def literal(q: torch.Tensor, scale: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """W[i, j] = q[i, j] · s[i // height, j // width], rounded once."""
    made = torch.empty(q.shape, dtype=torch.bfloat16)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            made[i, j] = (q[i, j].float() * scale[i // height, j // width].float()).to(torch.bfloat16)
    return made


@pytest.mark.parametrize("piece", [0, 7, 64])
def test_the_last_block_may_be_smaller(piece: int, tmp_path: Path) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows: four and a half blocks."""
    q, scale = codes(36, 20), torch.rand(5, 3)
    folder = layer({"weight": q, "weight_scale_inv": scale}, ABOUT | {"weight_block_size": [8, 8]}, tmp_path / "a")
    assert same(weight(folder, piece), literal(q, scale, 8, 8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    q, scale = codes(6, 10), torch.rand(shape)
    parts = {"weight": q, "weight_scale_inv": scale, "activation_scale": torch.ones(())}
    folder = layer(parts, {"quant_method": "fp8", "activation_scheme": "static"}, tmp_path / "a")
    assert same(weight(folder), literal(q, scale.reshape(1, 1), 6, 10))
    assert list(opened(folder).tensors) == [UP]


def test_stacked_experts_and_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    q, exponents = codes(2, 6, 8), torch.randint(120, 135, (2, 3, 2), dtype=torch.uint8)
    folder = layer({"weight": q, "weight_scale_inv": exponents}, ABOUT | {"weight_block_size": [2, 4]}, tmp_path / "a")
    expected = torch.stack(
        [literal(one, 2.0 ** (scale.float() - 127), 2, 4) for one, scale in zip(q, exponents, strict=True)]
    )
    assert same(weight(folder, 10), expected)


def test_the_type_that_config_json_names(tmp_path: Path) -> None:
    q, scale = codes(6, 10), torch.rand(1, 1)
    folder = layer({"weight": q, "weight_scale_inv": scale}, ABOUT, tmp_path / "a", torch_dtype="float16")
    assert same(weight(folder), (q.float() * scale).half())


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"weight": codes(6, 10)}, rf"{UP} is quantized, and {UP}_scale_inv, .* is missing"),
        ({"weight": codes(6, 10), "weight_scale_inv": torch.rand(4, 3)}, r"shape \[4, 3\] does not fit"),
        ({"weight": codes(6, 10), "weight_scale_inv": torch.rand(3)}, r"shape \[3\] does not fit"),
        ({"weight": codes(6, 10), "weight_scale_inv": torch.ones(1, 1, dtype=torch.int64)}, "has the type I64"),
        ({"weight": codes(6, 10), "weight_scale_inv": torch.ones(0, 1)}, "does not fit"),
    ],
)
def test_a_scale_that_is_missing_or_does_not_fit_is_named(parts: Tensors, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        opened(layer(parts, ABOUT, tmp_path / "a"))


def test_an_unknown_quantization_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = layer({"weight": codes(6, 10)}, {"quant_method": "aqlm"}, tmp_path / "a")
    assert main(["fapm", "--pre", str(folder), "--ft", str(folder), "--out", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "quantized by aqlm, which surgery does not read" in said
    assert "save_pretrained" in said
