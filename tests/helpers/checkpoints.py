"""Checkpoints on disk for the tests: real safetensors files, sharded or not, with a config.json."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.checkpoint.tensor import Tensor

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


Q = "model.layers.0.self_attn.q_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a file's header, and leave its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Save a checkpoint again with other tensors, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(tensor: Tensor, seed: int | None = None) -> bytes:
    """A tensor's bytes, read at once or in random pieces of any length in any order."""
    held = bytearray(tensor.nbytes)
    chosen = random.Random(seed)
    cuts = [] if seed is None else [chosen.randrange(tensor.nbytes + 1) for _ in range(20)]
    ends = [0, *sorted(cuts), tensor.nbytes]
    pieces = list(itertools.pairwise(ends))
    chosen.shuffle(pieces)
    with tensor.open() as reader:
        for begin, end in pieces:
            assert reader.fill(begin, memoryview(held)[begin:end]) <= tensor.nbytes
    return bytes(held)
