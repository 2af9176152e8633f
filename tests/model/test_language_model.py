"""The model that is scored is the one that transformers loads, whatever was in its place before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from helpers.tiny_lm import make_lm, make_tokenizer, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread
from safetensors.torch import load_file, save_file

from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import Checkpoint, open_checkpoint
from surgery.errors import CheckpointError, OptionError
from surgery.model.language_model import LanguageModel, computing_dtype

IDS = torch.tensor([[5, 9, 200, 31, 31, 7, 300], [8, 1, 0, 17, 44, 45, 46]])


def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve(str(folder), companions=False))


def stored_as(dtype: torch.dtype, folder: Path) -> Path:
    """A model whose weights are stored as `dtype`."""
    tensors = {
        name: tensor.to(dtype) for name, tensor in load_file(make_lm(folder / "a") / "model.safetensors").items()
    }
    save_file(tensors, folder / "a" / "model.safetensors", metadata={"format": "pt"})
    return folder / "a"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "mixtral", "deepseek_v3"])
def test_logits_are_those_of_transformers_bit_by_bit(tmp_path: Path, family: str) -> None:
    folder = make_lm(tmp_path / "a", family)
    with torch.inference_mode():
        plain = reference(folder)
        if family in ("mixtral", "deepseek_v3"):
            plain.set_experts_implementation("eager")
    assert torch.equal(logits(open_lm(folder).model), logits(plain))


def test_the_format_makes_no_difference(tmp_path: Path) -> None:
    first, second = make_lm(tmp_path / "a"), make_lm(tmp_path / "b")
    tensors = load_file(second / "model.safetensors")
    (second / "model.safetensors").unlink()
    torch.save(tensors, second / "pytorch_model.bin")
    one, other = open_lm(first), open_lm(second)
    assert torch.equal(logits(one.model), logits(other.model))
    assert torch.equal(logits(other.model), logits(reference(second)))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "deepseek_v3"])
def test_other_weights_replace_all_of_those_before(tmp_path: Path, family: str) -> None:
    first, second = make_lm(tmp_path / "a", family, seed=1), make_lm(tmp_path / "b", family, seed=2)
    # Vectors and buffers begin alike in all models.
    tensors = load_file(second / "model.safetensors")
    moved = {name: value + 0.25 if value.ndim == 1 else value for name, value in tensors.items()}
    save_file(moved, second / "model.safetensors", metadata={"format": "pt"})
    model = open_lm(first)
    before, fingerprint = logits(model.model), model.fingerprint
    model.load(checkpoint(second))
    fresh = open_lm(second)
    assert torch.equal(logits(model.model), logits(fresh.model))
    assert not torch.equal(logits(model.model), before)
    assert model.fingerprint == fresh.fingerprint != fingerprint
    mine, other = model.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    model.load(checkpoint(first))
    assert torch.equal(logits(model.model), before)
    assert model.fingerprint == fingerprint


def test_weights_that_do_not_fit_leave_no_fingerprint_behind(tmp_path: Path) -> None:
    folder, other = make_lm(tmp_path / "a"), make_lm(tmp_path / "b")
    tensors = load_file(other / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    model = open_lm(folder)
    fingerprint, before = model.fingerprint, logits(model.model)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        model.load(checkpoint(other))
    assert model.fingerprint == ""
    model.load(checkpoint(folder))
    assert model.fingerprint == fingerprint
    assert torch.equal(logits(model.model), before)


def test_a_buffer_that_only_the_first_has_is_not_made_up(tmp_path: Path) -> None:
    folder, other = make_lm(tmp_path / "a", "deepseek_v3"), make_lm(tmp_path / "b", "deepseek_v3")
    tensors = load_file(other / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("e_score_correction_bias"))
    tensors.pop(gone)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        open_lm(folder).load(checkpoint(other))


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, family: str) -> None:
    FAMILIES[family].build().save_pretrained(tmp_path / "a")
    make_tokenizer().save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no causal language model"):
        open_lm(tmp_path / "a")


def test_no_batch_is_refused(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a")
    with pytest.raises(OptionError, match="`batch_size`"):
        LanguageModel(folder, checkpoint(folder), device=torch.device("cpu"), batch=0)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_bfloat16_on_a_processor_that_is_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool, stored: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
    found = computing_dtype("auto", torch.device("cpu"), checkpoint(stored_as(stored, tmp_path)))
    assert found == (torch.bfloat16 if units and stored == torch.bfloat16 else torch.float32)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`dtype` is auto, float32, bfloat16, float16, not int8"):
        computing_dtype("int8", torch.device("cpu"), checkpoint(make_lm(tmp_path / "a")))
