"""Quantized checkpoints of tiny real models, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint
from surgery.__main__ import main
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import Checkpoint, open_checkpoint
from surgery.checkpoint.tensor import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def build(config: Any) -> PreTrainedModel:
    """A random model in bfloat16."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.bfloat16)
    return model


def quantized_copy(
    plain: Path, out: Path, about: dict[str, Any], quantize: Callable[[str, torch.Tensor], Tensors], **config: Any
) -> Path:
    """Write a checkpoint again with each tensor as `quantize` stores it, and what config.json says of that."""
    stored: Tensors = {}
    for name, tensor in read_checkpoint(plain).items():
        stored |= quantize(name, tensor)
    return write(out, stored, json.loads((plain / "config.json").read_text()) | {"quantization_config": about} | config)


def write(out: Path, stored: Tensors, config: dict[str, Any]) -> Path:
    """Save tensors and a configuration."""
    out.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config))
    return out


def layer(stored: Tensors, about: dict[str, Any], out: Path, **config: Any) -> Path:
    """A checkpoint of one quantized layer, for formulas: the weight is model.layers.0.mlp.up_proj."""
    named = {f"model.layers.0.mlp.up_proj.{part}": tensor for part, tensor in stored.items()}
    return write(out, named, {"model_type": "llama", "quantization_config": about} | config)


def opened(folder: Path) -> Checkpoint:
    """A checkpoint as surgery reads it."""
    return open_checkpoint(resolve(str(folder), companions=True))


def values(tensor: Tensor, piece: int = 0) -> torch.Tensor:
    """All entries of a tensor, read as a whole or in pieces of so many bytes."""
    held = memoryview(bytearray(tensor.nbytes))
    with tensor.open() as reader:
        for begin in range(0, len(held), piece or len(held)):
            reader.fill(begin, held[begin : begin + (piece or len(held))])
    return torch.frombuffer(held, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def weight(folder: Path, piece: int = 0) -> torch.Tensor:
    """The weight of a checkpoint of one `layer`."""
    return values(opened(folder).tensors["model.layers.0.mlp.up_proj.weight"], piece)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have one type and the same bits."""
    as_bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return found.dtype == expected.dtype and torch.equal(found.view(as_bits), expected.contiguous().view(as_bits))


def plain_twin(quantized: Path, out: Path) -> Path:
    """What transformers makes of a quantized checkpoint when it loads it, saved as plain numbers."""
    loaded = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")
    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    model = build(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    return out


def tuned_copy(plain: Path, out: Path) -> Path:
    """A fine-tuned copy in bfloat16."""
    config = json.loads((plain / "config.json").read_text())
    return write(out, fine_tuned(read_checkpoint(plain), scale=0.02), config)


def edited(pre: Path, ft: Path, out: Path) -> Tensors:
    """What `surgery fapm` writes, and that config.json names no quantization there."""
    assert main(["fapm", "--pre", str(pre), "--ft", str(ft), "--sparsity", "0.5", "--out", str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    return read_checkpoint(out)


def same_checkpoint(found: Tensors, expected: Tensors) -> bool:
    """Whether two checkpoints have the same tensors, bit by bit."""
    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)
