"""Measure a saved checkpoint of the demo: accuracy per skill, and distance from the pre-trained weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from surgery.demo.model import load_model
from surgery.demo.skills import Item
from surgery.demo.tokens import IGNORED, encode


def exact_match(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return whether each item is answered exactly: bool [items], from logits [items, time, vocabulary], labels [items, time].

    The whole answer must be right, and end where it ends. Greedy decoding writes an answer exactly when, with the right
    answer fed in, the most likely token is the right one at every step; so one forward pass decides it.
    """
    right = logits.argmax(-1) == labels
    return (right | (labels == IGNORED)).all(-1)


def accuracies(folder: Path, skills: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """Share of each skill's items, from 0 to 1, that the checkpoint in `folder` answers exactly (float32 compute)."""
    model = load_model(folder)
    shares: dict[str, float] = {}
    with torch.inference_mode():
        for name, items in skills.items():
            inputs, labels = encode(items)
            logits = model(input_ids=inputs, use_cache=False).logits
            shares[name] = exact_match(logits, labels).double().mean().item()
    return shares


def distance(pre: Path, other: Path) -> float:
    """Mean over tensors of ‖θ − θ0‖ / ‖θ0‖ (MoFO paper, D.4), in float64, of two checkpoint folders.

    Both must hold tensors of the same names and shapes; a tensor of zeros in `pre` has no relative distance and is
    left out.
    """
    shards = {folder: _tensor_shards(folder) for folder in (pre, other)}
    ratios: list[float] = []
    for name in shards[pre]:
        before, after = (_read(shards[folder][name], name) for folder in (pre, other))
        norm = before.norm().item()
        if norm > 0:
            ratios.append((after - before).norm().item() / norm)
    return sum(ratios) / len(ratios)


def _tensor_shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file in `folder` that holds it."""
    found: dict[str, Path] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), shard))
    return found


def _read(shard: Path, name: str) -> torch.Tensor:
    with safe_open(shard, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.double()
