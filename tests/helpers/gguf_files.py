"""GGUF files for the tests: tiny models, saved by the gguf package as llama.cpp's converter does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from transformers import PreTrainedModel

from helpers.families import Family
from surgery.checkpoint.tensor import Span, Tensor

Array = NDArray[Any]
BIAS = {"attention_bias": True}
IDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    **IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Sizes that can be cut into blocks of 32.
MODELS = {
    "llama": Family("LlamaConfig", SIZE | BIAS),
    "qwen2": Family("Qwen2Config", SIZE | {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", SIZE | {"head_dim": 32}),
    "phi3": Family("Phi3Config", SIZE),
    "gemma": Family("GemmaConfig", SIZE | {"head_dim": 32}),
    "gemma2": Family("Gemma2Config", SIZE | {"head_dim": 32}),
    "gemma3": Family("Gemma3TextConfig", SIZE | {"head_dim": 32}),
    "nemotron": Family("NemotronConfig", SIZE),
    "starcoder2": Family("Starcoder2Config", SIZE | {"tie_word_embeddings": True}),
    "gpt2": Family("GPT2Config", {**IDS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "bloom": Family("BloomConfig", {**IDS, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
}


def converted(architecture: str, name: str, values: Array, heads: int, key_heads: int) -> Array:
    """A tensor as llama.cpp's convert_hf_to_gguf.py hands it to the writer."""
    if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
        count = key_heads if ".k_proj." in name else heads
        return values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if architecture == "bloom" and ".query_key_value." in name:
        return values.reshape(heads, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    return values


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, kind: Type = Type.F32, **extra: Any) -> Path:
    """Save a model with the gguf package: matrices in the type asked for, the rest in F32, as the converter does."""
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", heads)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_chat_template("x" * 100_000)
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tied = getattr(config, "tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stored = names.get_name(name.removeprefix("transformer."), (".weight", ".bias")) or names.get_name(
            name, (".weight", ".bias")
        )
        assert stored, name
        values = np.ascontiguousarray(converted(architecture, name, tensor.float().numpy(), heads, key_heads))
        stored_as = kind if values.ndim > 1 else Type.F32
        writer.add_tensor(stored, gguf.quantize(values, stored_as), raw_dtype=stored_as)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save(folder: Path, model: PreTrainedModel) -> Path:
    """Save a model as a Hugging Face checkpoint with one safetensors file."""
    model.save_pretrained(folder)
    return folder


def stored_names(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the other side of a pair would hold, names and shapes alone."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else ""
    return {
        name: Tensor(name, "F32", tuple(tensor.shape), Span(Path("other"), 0))
        for name, tensor in model.state_dict().items()
        if name != tied
    }


def shake(model: PreTrainedModel) -> None:
    """Give norms and biases, which begin as ones and zeros, numbers that tell one from the other."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
