"""compressed-tensors: files of its own compressors against its own decompression, and by the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors
from helpers.quantized import layer, opened, same, weight

from surgery.errors import CheckpointError

ROWS, COLUMNS = 24, 40
NAME = "model.layers.0.mlp.up_proj.weight"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]}),
    "int8-tensor": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8-channel-zero": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int4-group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "int4-group-zero": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "int8-group": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8}),
}
GRIDS = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, COLUMNS // 8), "block": (3, 3)}


def about(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    """What config.json says."""
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def scale_of(weights: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(2)
    return (0.01 + 0.02 * torch.rand(GRIDS[weights["strategy"]])).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_what_the_library_compresses_is_what_it_decompresses(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("compressed_tensors.quantization")
    compressors: Any = pytest.importorskip("compressed_tensors.compressors")

    format, weights = KINDS[kind]
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**weights))
    scale = scale_of(weights, dtype)
    state: Tensors = {"weight": torch.randn(ROWS, COLUMNS, dtype=dtype), "weight_scale": scale}
    if weights.get("symmetric") is False:
        low = 1 << (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-low, low, scale.shape, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    folder = layer({part: tensor.clone() for part, tensor in stored.items()}, about(format, weights), tmp_path / "a")
    assert same(weight(folder, 50), expected.to(torch.bfloat16))
    assert list(opened(folder).tensors) == [NAME]


@pytest.mark.parametrize("kind", ["fp8-tensor", "fp8-channel", "fp8-block", "int8-tensor", "int8-channel"])
def test_the_formula_of_a_code_in_a_byte(kind: str, tmp_path: Path) -> None:
    """W = q · s, rounded once to the type of s."""
    format, weights = KINDS[kind]
    scale, size = scale_of(weights), {"tensor": (ROWS, COLUMNS), "channel": (1, COLUMNS), "block": (8, 16)}
    q = (40 * torch.randn(ROWS, COLUMNS)).to(torch.float8_e4m3fn if weights["type"] == "float" else torch.int8)
    grid, (height, width) = scale.reshape(-1, scale.shape[-1]).double(), size[weights["strategy"]]
    expected = torch.tensor(
        [[float(q[i, j]) * float(grid[i // height, j // width]) for j in range(COLUMNS)] for i in range(ROWS)],
        dtype=torch.float64,
    )
    parts = {"weight": q, "weight_scale": scale, "input_scale": torch.ones(1)}
    assert same(weight(layer(parts, about(format, weights), tmp_path / "a")), expected.to(torch.bfloat16))


@pytest.mark.parametrize("zero", [False, True])
def test_the_formula_of_packed_codes(zero: bool, tmp_path: Path) -> None:
    """Eight codes in a word, lowest first, less 8; zero points likewise along the rows; groups in any order of the columns."""
    torch.manual_seed(3)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (ROWS, COLUMNS // 8), dtype=torch.int32)
    zero_words = torch.randint(-(1 << 31), (1 << 31) - 1, (ROWS // 8, 5), dtype=torch.int32)
    scale, groups = torch.rand(ROWS, 5), torch.randint(0, 5, (COLUMNS,), dtype=torch.int32)

    def code(word: torch.Tensor, number: int) -> int:
        return ((int(word) >> 4 * number) & 15) - 8

    expected = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for i in range(ROWS):
        for j in range(COLUMNS):
            g = int(groups[j])
            z = code(zero_words[i // 8, g], i % 8) if zero else 0
            expected[i, j] = (code(words[i, j // 8], j % 8) - z) * float(scale[i, g])
    parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([ROWS, COLUMNS])}
    parts |= {"weight_g_idx": groups} | ({"weight_zero_point": zero_words} if zero else {})
    folder = layer(parts, about("pack-quantized", {"num_bits": 4}), tmp_path / "a")
    assert same(weight(folder), expected.float().to(torch.bfloat16))


FP8 = torch.zeros(ROWS, COLUMNS).to(torch.float8_e4m3fn)
WORDS = torch.zeros(ROWS, COLUMNS // 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"weight": FP8}, f"{NAME} is quantized, and {NAME}_scale, .* is missing"),
        ({"weight": FP8, "weight_scale": torch.ones(7, 1)}, r"\[7, 1\] does not fit"),
        ({"weight_packed": WORDS, "weight_scale": torch.ones(ROWS, 1)}, "weight_shape, .* is missing"),
        (
            {
                "weight_packed": WORDS,
                "weight_scale": torch.ones(ROWS, 1),
                "weight_shape": torch.tensor([ROWS, 1 << 40]),
            },
            "no tensor of 24 rows and 1099511627776 columns",
        ),
    ],
)
def test_a_part_that_is_missing_or_does_not_fit_is_named(parts: Tensors, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        opened(layer(parts, about("float-quantized", {}), tmp_path / "a"))


def test_groups_that_point_nowhere_are_an_error(tmp_path: Path) -> None:
    parts = {"weight_packed": WORDS, "weight_scale": torch.ones(ROWS, 5), "weight_shape": torch.tensor([ROWS, COLUMNS])}
    folder = layer(
        parts | {"weight_g_idx": torch.full((COLUMNS,), 5, dtype=torch.int32)},
        about("pack-quantized", {}),
        tmp_path / "a",
    )
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        weight(folder)


def test_another_format_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed as nvfp4-pack-quantized, which surgery does not read"):
        opened(layer({"weight_packed": WORDS.to(torch.uint8)}, about("nvfp4-pack-quantized", {}), tmp_path / "a"))
