"""bitsandbytes in 4 and 8 bits, as the library writes and dequantizes it, and by the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, read_checkpoint, tiny_llama
from helpers.quantized import edited, layer, opened, same, same_checkpoint, values, weight, write
from safetensors.torch import save_file

from surgery.errors import CheckpointError

ROWS, COLUMNS = 24, 72  # a row is no whole number of blocks
NAME = "model.layers.0.mlp.up_proj.weight"
ABOUT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def plain(dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (300, 130)])
def test_four_bits_are_what_the_library_makes_of_them(
    kind: str, double: bool, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(plain(dtype, *shape), quant_type=kind, compress_statistics=double)
    expected = functional.dequantize_4bit(codes, state).to(torch.bfloat16)
    stored = {"weight": codes} | {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    folder = layer(stored, ABOUT, tmp_path / "a")
    assert same(weight(folder, 100), expected)
    assert list(opened(folder).tensors) == [NAME]


def test_eight_bits_are_what_the_library_makes_of_them(tmp_path: Path) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(plain(torch.float16))
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = layer(stored, ABOUT, tmp_path / "a")
    assert same(weight(folder), functional.int8_vectorwise_dequant(codes, scale).to(torch.bfloat16))
    assert list(opened(folder).tensors) == [NAME]


def four_bits(double: bool, **changed: Any) -> Tensors:
    """Random codes of five blocks of 64, with every part that the format has."""
    torch.manual_seed(5)
    said: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [20, 15]}
    parts = {"weight": torch.randint(0, 256, (150, 1), dtype=torch.uint8), "weight.quant_map": torch.randn(16)}
    if double:
        said |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.25}
        parts["weight.absmax"] = torch.randint(0, 256, (5,), dtype=torch.uint8)
        parts["weight.nested_absmax"], parts["weight.nested_quant_map"] = torch.rand(3), torch.randn(256)
    else:
        parts["weight.absmax"] = torch.rand(5)
    state = torch.frombuffer(bytearray(json.dumps(said | changed).encode()), dtype=torch.uint8)
    return parts | {"weight.quant_state.bitsandbytes__nf4": state}


@pytest.mark.parametrize("double", [False, True])
def test_the_formula_of_four_bits(double: bool, tmp_path: Path) -> None:
    parts = four_bits(double)
    expected = []
    for i in range(300):
        byte, block = int(parts["weight"][i // 2, 0]), i // 64
        scale = parts["weight.absmax"][block]
        if double:
            scale = parts["weight.nested_quant_map"][int(scale)] * parts["weight.nested_absmax"][block // 2] + 0.25
        expected.append(parts["weight.quant_map"][byte >> 4 if i % 2 == 0 else byte & 15] * scale)
    folder = layer(parts, ABOUT, tmp_path / "a")
    assert same(weight(folder, 70), torch.stack(expected).reshape(20, 15).to(torch.bfloat16))


def test_codes_that_are_stored_as_another_type(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`, for FSDP."""
    parts = four_bits(False)
    expected = weight(layer(parts, ABOUT, tmp_path / "a"))
    parts["weight"] = parts["weight"].flatten().view(torch.bfloat16)[:, None]
    assert same(weight(layer(parts, ABOUT, tmp_path / "b")), expected)


def test_the_formula_of_eight_bits(tmp_path: Path) -> None:
    codes, scale = torch.arange(-120, 120, dtype=torch.int8).reshape(20, 12), torch.rand(20)
    expected = (codes * scale[:, None]) * torch.tensor(1 / 127)
    assert same(weight(layer({"weight": codes, "SCB": scale}, ABOUT, tmp_path / "a")), expected.to(torch.bfloat16))


def without(part: str) -> Tensors:
    parts = four_bits(True)
    del parts[part]
    return parts


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (without("weight.absmax"), f"{NAME} is quantized, and {NAME}.absmax, .* is missing"),
        (without("weight.nested_quant_map"), "nested_quant_map, .* is missing"),
        (without(STATE), f"{STATE}, .* is missing"),
        (four_bits(False) | {STATE: torch.zeros(80, dtype=torch.uint8)}, f"{STATE}, which says .* damaged"),
        (four_bits(False, shape=[20, 17]), "does not fit"),
        (four_bits(False, shape=[1 << 47, 1 << 47]), "does not fit"),
        (four_bits(False, shape=[-20, -15]), "damaged"),
        (four_bits(False, blocksize=0), "damaged"),
        (four_bits(False, blocksize=128), r"absmax of shape \[5\] does not fit"),
        ({"weight": torch.zeros(4, 4, dtype=torch.int8)}, "SCB, .* is missing"),
        (
            {
                "weight": torch.zeros(4, 4, dtype=torch.int8),
                "SCB": torch.ones(4),
                "weight_format": torch.tensor(1, dtype=torch.uint8),
            },
            "not stored row by row",
        ),
    ],
)
def test_a_part_that_is_missing_or_damaged_is_named(parts: Tensors, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        opened(layer(parts, ABOUT, tmp_path / "a"))


def test_an_adapter_on_a_quantized_base_gives_what_it_gives_on_the_plain_one(tmp_path: Path) -> None:
    stored: Tensors = {}
    torch.manual_seed(6)
    for name, tensor in tiny_llama().items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(tensor.shape)}
        stored[name] = torch.randint(0, 256, (tensor.numel() // 2, 1), dtype=torch.uint8)
        stored[f"{name}.absmax"] = torch.rand(tensor.numel() // 64)
        stored[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
        state = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = state
    base = write(tmp_path / "bnb", stored, {"model_type": "llama", "quantization_config": ABOUT})
    numbers = {name: values(tensor) for name, tensor in opened(base).tensors.items()}
    plain_base = write(tmp_path / "plain", numbers, {"model_type": "llama"})

    module = "base_model.model.model.layers.1.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    factors = {f"{module}.lora_A.weight": torch.randn(4, 16), f"{module}.lora_B.weight": torch.randn(16, 4)}
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(said))
    found = edited(base, tmp_path / "lora", tmp_path / "out")
    assert same_checkpoint(found, edited(plain_base, tmp_path / "lora", tmp_path / "expected"))
    changed = [name for name, tensor in read_checkpoint(plain_base).items() if not same(found[name], tensor)]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]
