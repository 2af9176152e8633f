"""gpt-oss with experts in MXFP4, as transformers loads it, and by the formula."""

from __future__ import annotations

from pathlib import Path

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
)
from transformers import GptOssConfig

from surgery.errors import CheckpointError

CONFIG = GptOssConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=2,
    layer_types=["full_attention"] * 2,
)
ABOUT = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
}
EXPERTS = "model.layers.0.mlp.up_proj.experts"


def quantize(name: str, tensor: torch.Tensor) -> Tensors:
    """Random codes in place of the experts [experts, in, out]; the rest as it is."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    experts, into, out = tensor.shape
    return {
        f"{name}_blocks": torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(115, 122, (experts, out, into // 32), dtype=torch.uint8),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A quantized model, a fine-tuned one in bfloat16, and the first as transformers dequantizes it."""
    build(CONFIG).save_pretrained(tmp_path / "plain")
    quantized = quantized_copy(tmp_path / "plain", tmp_path / "mxfp4", ABOUT, quantize)
    return quantized, tuned_copy(tmp_path / "plain", tmp_path / "ft"), plain_twin(quantized, tmp_path / "twin")


def test_every_tensor_is_what_transformers_loads(pair: tuple[Path, Path, Path]) -> None:
    quantized, _, twin = pair
    tensors, expected = opened(quantized).tensors, read_checkpoint(twin)
    assert tensors.keys() == expected.keys()
    assert all(same(values(tensor, 1000), expected[name]) for name, tensor in tensors.items())


def test_a_run_writes_what_it_writes_with_the_plain_model(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    quantized, ft, twin = pair
    assert same_checkpoint(edited(quantized, ft, tmp_path / "out"), edited(twin, ft, tmp_path / "expected"))
    assert same_checkpoint(edited(ft, quantized, tmp_path / "as-ft"), edited(ft, twin, tmp_path / "expected-as-ft"))
    assert same_checkpoint(edited(quantized, quantized, tmp_path / "both"), read_checkpoint(twin))


def test_the_formula(tmp_path: Path) -> None:
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (2, 3, 2), dtype=torch.uint8)
    expected = torch.empty(2, 64, 3, dtype=torch.float64)
    for e in range(2):
        for r in range(3):
            for g in range(2):
                for b in range(16):
                    byte, scale = int(blocks[e, r, g, b]), 2.0 ** (int(scales[e, r, g]) - 127)
                    expected[e, 32 * g + 2 * b, r] = numbers[byte & 15] * scale
                    expected[e, 32 * g + 2 * b + 1, r] = numbers[byte >> 4] * scale
    folder = layer({"experts_blocks": blocks, "experts_scales": scales}, ABOUT, tmp_path / "a")
    assert same(values(opened(folder).tensors[EXPERTS]), expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("blocks", "scales", "complaint"),
    [
        ((2, 3, 2, 16), None, f"{EXPERTS}_blocks is quantized, and {EXPERTS}_scales, .* is missing"),
        ((2, 3, 2, 16), (2, 3, 1), r"_scales of shape \[2, 3, 1\] does not fit"),
        ((2, 3, 2, 8), (2, 3, 2), r"\[2, 3, 2, 8\]"),
    ],
)
def test_codes_that_do_not_fit_are_named(
    blocks: tuple[int, ...], scales: tuple[int, ...] | None, complaint: str, tmp_path: Path
) -> None:
    parts = {"experts_blocks": torch.zeros(blocks, dtype=torch.uint8)}
    if scales:
        parts["experts_scales"] = torch.zeros(scales, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=complaint):
        opened(layer(parts, ABOUT, tmp_path / "a"))
