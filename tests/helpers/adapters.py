"""Adapters that peft makes of tiny models, and peft's own merge of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.checkpoints import Tensors, read_checkpoint
from helpers.families import Family
from surgery.checkpoint.source import open_both
from surgery.checkpoint.tensor import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Made:
    """An adapter, the base that it was made for, and peft's merge of the two."""

    base: Path
    adapter: Path
    merged: Tensors
    folder: Path

    @property
    def ours(self) -> dict[str, Tensor]:
        return open_both(str(self.base), str(self.adapter))[1][0].tensors


def make(
    folder: Path,
    family: Family,
    *,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    rows: int | None = None,
    safe: bool = True,
    config: Callable[..., PeftConfig] = LoraConfig,
    **options: Any,
) -> Made:
    """Build a tiny model, train an adapter at random, save both, and merge them with peft.

    Args:
        dtype, stored: types of the base and, where it is another than peft's own, of the adapter's numbers.
        rows: of the vocabulary, resized before training.
        safe: adapter_model.safetensors, not .bin.
        config, options: the type of adapter, LoRA of rank 4 where nothing else is said, and its settings.
    """
    base, adapter = folder / "base", folder / "adapter"
    model = family.build(1, dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # biases begin as zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    model.save_pretrained(base)
    # The defaults of initialisation make B zero, and what is trained as a whole equal to the base.
    defaults = {"r": 4, "lora_alpha": 6} if config is LoraConfig else {}
    trained = get_peft_model(reload(model, base, rows), config(**{**defaults, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    trained.save_pretrained(str(adapter), safe_serialization=safe)
    if stored is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({key: value.to(stored) for key, value in tensors.items()}, adapter / "adapter_model.safetensors")
    PeftModel.from_pretrained(reload(model, base, rows), str(adapter)).merge_and_unload().save_pretrained(
        folder / "merged"
    )
    return Made(base, adapter, read_checkpoint(folder / "merged"), folder)


def reload(model: PreTrainedModel, folder: Path, rows: int | None) -> PreTrainedModel:
    """The model from disk, with so many rows in its vocabulary."""
    found: PreTrainedModel = type(model).from_pretrained(folder, dtype=model.dtype)
    if rows:
        torch.manual_seed(3)
        found.resize_token_embeddings(rows)
    return found


def fill(tensor: Tensor, offset: int = 0, count: int | None = None) -> bytes:
    data = bytearray(tensor.nbytes - offset if count is None else count)
    with tensor.open() as reader:
        reader.fill(offset, memoryview(data))
    return bytes(data)


def load(tensor: Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(fill(tensor)), dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


@cache
def blas_is_fused() -> bool:
    """Whether torch's matmul sums in order by fused multiply-adds here, as on x86: then peft's bits can be expected."""
    a, b = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), torch.full((48, 8), 0.3)
    for column, result in enumerate((b @ a)[5].tolist()):
        total = Fraction(0)
        for k in range(8):
            exact = total + Fraction(b[5, k].item()) * Fraction(a[k, column].item())
            total = Fraction(float(np.float32(float(exact))))
        if float(total) != result:
            return False
    return True


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    if blas_is_fused():
        word = WORDS[ours.dtype]
        assert torch.equal(ours.view(word), theirs.contiguous().view(word)), name
    else:
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(ours.dtype).eps, atol=1e-7)


def assert_is_merged(made: Made) -> None:
    """Every tensor is peft's, and something changed."""
    ours, base = made.ours, read_checkpoint(made.base)
    assert ours.keys() == made.merged.keys() == base.keys()
    for name, tensor in ours.items():
        assert_same(load(tensor), made.merged[name], name)
    changed = [name for name in base if not torch.equal(base[name], made.merged[name])]
    assert changed == [name for name in base if ours[name].path.parent != made.base]
