"""The norms against a literal double loop over hooks, on the model as transformers itself loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import read_checkpoint
from helpers.families import FAMILIES
from helpers.hooks import NOT_TEXT, double_loop, expected, hooked, opened, sample_tokens, saved
from safetensors.torch import load_file, save_file

from surgery.calibrate.lockstep import measure
from surgery.methods.wanda import Norm


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_TEXT])
def test_the_norms_are_those_of_a_double_loop_over_hooks(family: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, family)
    tokens = sample_tokens()
    norms = measure(checkpoint, tmp_path, tokens)
    model, seen = hooked(tmp_path, family, tokens)
    stored = read_checkpoint(tmp_path)
    want = expected(model, seen, stored)
    assert {name.split("#")[0] for name in want} == norms.keys() - routers(norms, want)
    for name, (values, count, e) in want.items():
        norm = norms[name.split("#")[0]]
        got, number = (norm.values[e], norm.tokens[e]) if "#" in name else (norm.values, norm.tokens)  # type: ignore[index]
        np.testing.assert_allclose(got, values, rtol=2e-5, atol=1e-7, err_msg=name)
        assert number == count, name
        assert stored[name.split("#")[0]].shape[-2 if norm.transposed else -1] == len(got), name
    for name, norm in norms.items():  # experts that no token reached
        if norm.values.ndim == 2:
            unseen = [e for e in range(len(norm.values)) if f"{name}#{e}" not in want]
            assert not norm.values[unseen].any()
            assert not norm.tokens[unseen].any()  # type: ignore[index]


def routers(norms: dict[str, Norm], want: dict[str, Any]) -> set[str]:
    """Experts stored one by one that no token reached: 0, and nothing in the loop."""
    return {name for name in norms.keys() - want.keys() if ".experts." in name and not np.any(norms[name].tokens)}


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("t5", torch.float16)])
def test_half_precision_runs_as_transformers_runs_it(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """T5 keeps some weights in float32 where the others are float16."""
    checkpoint = saved(tmp_path, family, dtype=dtype)
    tokens = sample_tokens()
    norms = measure(checkpoint, tmp_path, tokens)
    model, seen = hooked(tmp_path, family, tokens)
    assert ({parameter.dtype for parameter in model.parameters()} == {dtype}) == (family == "llama")
    for (name, _), rows in seen.items():
        if name in norms:
            np.testing.assert_allclose(norms[name].values, double_loop(rows), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "mamba", "bert"])
def test_the_batch_size_does_not_matter(family: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, family)
    tokens = sample_tokens(7, 12)
    one = measure(checkpoint, tmp_path, tokens)
    for batch in (2, 3, 7, 100):
        other = measure(checkpoint, tmp_path, tokens, batch=batch)
        assert other.keys() == one.keys()
        for name, norm in one.items():
            np.testing.assert_allclose(other[name].values, norm.values, rtol=1e-6, atol=1e-7, err_msg=name)
            assert np.array_equal(other[name].tokens, norm.tokens)


def test_an_expert_that_no_token_reached_says_so(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "mixtral")
    norms = measure(checkpoint, tmp_path, sample_tokens(1, 2))
    experts = {name: norm for name, norm in norms.items() if ".experts." in name}
    counts = [int(norm.tokens) for name, norm in experts.items() if name.endswith("w1.weight")]
    assert sum(counts) == 3 * 2 * 2  # layers, tokens, experts for each
    assert 0 in counts
    for norm in experts.values():
        assert bool(norm.values.any()) == (norm.tokens != 0)


def test_a_tied_embedding_that_is_stored_beside_its_head_gets_the_heads_norms(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    path = tmp_path / "model.safetensors"
    alone = measure(opened(tmp_path), tmp_path, sample_tokens())
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    both = measure(opened(tmp_path), tmp_path, sample_tokens())
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(both[name].values, alone["model.embed_tokens.weight"].values)


def test_an_embedding_that_training_parted_from_its_head_has_no_norms(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    norms = measure(opened(tmp_path), tmp_path, sample_tokens())
    assert "lm_head.weight" in norms
    assert "model.embed_tokens.weight" not in norms


def test_a_checkpoint_without_its_prefix_is_run_all_the_same(tmp_path: Path) -> None:
    """As gpt2 itself is stored: "h.0.…" where the model has "transformer.h.0.…"."""
    saved(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    whole = measure(opened(tmp_path), tmp_path, sample_tokens())
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    bare = measure(opened(tmp_path), tmp_path, sample_tokens())
    assert {name.removeprefix("transformer.") for name in whole} == bare.keys()
    for name, norm in whole.items():
        np.testing.assert_array_equal(bare[name.removeprefix("transformer.")].values, norm.values)
        assert norm.transposed == ("wte" not in name)
