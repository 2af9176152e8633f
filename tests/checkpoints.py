"""Checkpoints on disk for the tests: real safetensors files, sharded or not, with a config.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"


def write_checkpoint(
    folder: Path, tensors: Tensors, *, shards: int = 1, config: dict[str, object] | None = None
) -> Path:
    """Save tensors as a checkpoint, dealt to the shards in turn, and return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {name: files[position % shards] for position, name in enumerate(tensors)}
    for file in files:
        mine = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def read_checkpoint(folder: Path) -> Tensors:
    """Every tensor of every shard, by name."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys(), f"{path} repeats a tensor"
        tensors |= found
    return tensors


def tiny_llama(dtype: torch.dtype = torch.bfloat16, *, layers: int = 2, width: int = 16, seed: int = 0) -> Tensors:
    """Random tensors with the names and proportions of a Llama checkpoint with an untied head."""
    generator = torch.Generator().manual_seed(seed)
    ffn, vocabulary, kv = 3 * width, 4 * width, width // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (kv, width),
            f"{prefix}self_attn.v_proj.weight": (kv, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}mlp.gate_proj.weight": (ffn, width),
            f"{prefix}mlp.up_proj.weight": (ffn, width),
            f"{prefix}mlp.down_proj.weight": (width, ffn),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()}


def fine_tuned(pre: Tensors, *, scale: float = 0.005, seed: int = 1) -> Tensors:
    """pre, with every floating-point tensor moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in pre.items()
    }


def tiny_llama_pair(
    tmp_path: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 2, *, layers: int = 2, width: int = 16
) -> tuple[Path, Path]:
    """A tiny random Llama and its fine-tune, `tmp_path/pre` and `tmp_path/ft`."""
    pre = tiny_llama(dtype, layers=layers, width=width)
    return (
        write_checkpoint(tmp_path / "pre", pre, shards=shards),
        write_checkpoint(tmp_path / "ft", fine_tuned(pre), shards=shards),
    )
