"""How much memory a calibration takes: `python calibration_memory.py FOLDER LAYERS WIDTH SAMPLES LENGTH MAX_POSITIONS`.

Makes a Llama of zeros in FOLDER (a file with a hole: it takes no disk), calibrates, and prints as JSON the resident set before
and at its peak, in bytes, and the time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.calibrate.lockstep import measure
from surgery.checkpoint.formats.safetensors import encode_header
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.checkpoint.tensor import Span, Tensor
from surgery.model.skeleton import activation_bytes


def make(folder: Path, layers: int, width: int, positions: int) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=positions,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    path = folder / "model.safetensors"
    tensors = [Tensor(name, "BF16", tuple(value.shape), Span(path, 0)) for name, value in model.state_dict().items()]
    header, _ = encode_header(tensors, {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(tensor.nbytes for tensor in tensors))
    return config


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    folder = Path(sys.argv[1])
    layers, width, samples, length, positions = map(int, sys.argv[2:])
    make(folder, 1, 64, 64)
    tokens = torch.ones(samples, length, dtype=torch.int64)
    measure(open_checkpoint(resolve(str(folder), companions=False)), folder, tokens[:1, :2])  # imports, thread pools
    config = make(folder, layers, width, positions)
    before, start = peak(), time.perf_counter()
    norms = measure(open_checkpoint(resolve(str(folder), companions=False)), folder, tokens)
    result = {
        "tensors": len(norms),
        "file": (folder / "model.safetensors").stat().st_size,
        "activations": activation_bytes(config, samples, length, torch.bfloat16),
        "before": before,
        "peak": peak(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
