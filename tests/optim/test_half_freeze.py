"""half_freeze: it freezes what Half-Reset resets, and frozen tensors cost nothing and keep their bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from surgery.errors import OptionError
from surgery.methods.half_reset import choose
from surgery.optim import MoFO, half_freeze


def llama(layers: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **{**sizes, **options}))


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("level", ["category", "layer", "model"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_what_half_reset_would_reset_is_frozen_and_reported(level: str, ratio: float) -> None:
    model = llama()
    choice = half_freeze(model, ratio, level, seed=3)
    assert frozen(model) == set(choice.names) == choose(dict(model.named_parameters()), ratio, level, 3)
    entries = {name: p.numel() for name, p in model.named_parameters()}
    assert choice.frozen == sum(entries[name] for name in choice.names)
    assert choice.share == choice.frozen / sum(entries.values())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}.isdisjoint(choice.names)
    assert (choice.ratio, choice.level, choice.seed) == (ratio, level, 3)


def test_a_frozen_matrix_has_no_product_for_its_gradient() -> None:
    """Counted by torch: 2 · tokens · entries fewer operations for each frozen matrix, and no others."""
    model, ids = llama(), torch.arange(20).view(2, 10)

    def backward() -> int:
        loss = model(input_ids=ids, labels=ids).loss
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        return int(counted.get_total_flops())

    full = backward()
    names = half_freeze(model, 0.5).names
    matrices = [p for p in map(model.get_parameter, names) if p.ndim == 2]
    assert len(matrices) > 10
    assert full - backward() == sum(2 * ids.numel() * p.numel() for p in matrices)


def test_another_round_draws_anew_and_trains_what_the_last_one_froze_but_not_what_the_caller_froze() -> None:
    model = llama()
    mine = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(mine).requires_grad_(False)
    rounds = []
    for seed in range(6):
        choice = half_freeze(model, seed=seed)
        assert frozen(model) == {*choice.names, mine}
        rounds.append(choice.names)
    assert len(set(rounds)) == 6
    assert any(mine in names for names in rounds)
    assert any(mine not in names for names in rounds)
    half_freeze(model, 0.0)
    assert frozen(model) == {mine}


def test_embedding_head_and_final_norm_are_frozen_when_asked() -> None:
    model = llama()
    names = half_freeze(model, 0.0, also=("embedding", "head", "norm")).names
    assert set(names) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    tied = llama(tie_word_embeddings=True)
    assert half_freeze(tied, 0.0, also=("head",)).names == ()
    assert half_freeze(tied, 0.0, also=("embedding",)).share == 32 * 16 / sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize(
    "make", [lambda p: MoFO(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)], ids=["mofo", "adamw"]
)
def test_frozen_tensors_keep_their_bits_and_have_neither_gradient_nor_state(make: Any) -> None:
    model = llama()
    optimizer = make(model.parameters())
    ids = torch.arange(8).view(1, 8)
    model(ids, labels=ids).loss.backward()
    choice = half_freeze(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        held = name in choice.names
        assert torch.equal(p, before[name]) == held, name
        assert (p.grad is None) == held
        assert (p in optimizer.state) == (not held)


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "module."]
)
def test_a_wrapped_model_draws_the_same_half(wrap: Any) -> None:
    model = llama()
    plain = set(half_freeze(model, seed=5).names)
    wrapped = wrap(llama())
    names = half_freeze(wrapped, seed=5).names
    assert {name.removeprefix("_orig_mod.").removeprefix("module.") for name in names} == plain
    assert len(plain) > 10


def test_a_mixture_of_experts_is_halved_in_memory_too() -> None:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4,
        )
    )  # fmt: skip
    names = half_freeze(model, 1.0).names
    assert any("experts" in name for name in names)
    assert not any(name.endswith(("gate.weight", "router.weight")) for name in names), "routers are trained"


def test_what_cannot_be_meant_is_refused_and_changes_nothing() -> None:
    model = llama()
    half_freeze(model, seed=1)
    before = frozen(model)
    bad: list[dict[str, Any]] = [
        {"ratio": 1.5},
        {"ratio": float("nan")},
        {"level": "row"},
        {"seed": -1},
        {"also": ("mlp",)},
    ]
    for options in bad:
        with pytest.raises(OptionError):
            half_freeze(model, **options)
    assert frozen(model) == before
    with pytest.raises(OptionError, match="belongs to a layer"):
        half_freeze(nn.Linear(2, 2))
    assert frozen(copy.deepcopy(model)) == before


# Matrices of attention + feed-forward that are trained -> the paper's subscript (its Tables 3, 8 and 9), in percent.
TABLE_8 = {
    ((3,), (3,)): 8.3,
    ((4,), (2,)): 22.3,
    ((3,), (2,)): 30.6,
    ((2,), (2,)): 38.9,
    ((2,), (1, 2)): 50.0,
    ((2,), (1,)): 61.1,
    ((1,), (1,)): 69.4,
    ((0,), (1,)): 77.7,
    ((1,), (0,)): 91.7,
    ((0,), (0,)): 100.0,
}


def test_counts_of_matrices_give_the_papers_shares_of_llama_2_7b() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # whose defaults are that model's
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    for (attention, feed_forward), share in TABLE_8.items():
        choice = half_freeze(model, counts={"attention": attention, "feed_forward": feed_forward})
        assert round(100 * choice.trainable, 1) == share, (attention, feed_forward)
        for layer in range(32):
            names = [name for name in choice.names if f".{layer}." in name]
            assert sum("self_attn" in name for name in names) == attention[layer % len(attention)]
            assert sum("mlp" in name for name in names) == feed_forward[layer % len(feed_forward)]
            assert sum("layernorm" in name for name in names) == 1


def test_more_matrices_than_a_layer_has_are_refused_and_nothing_changes() -> None:
    model = llama()
    half_freeze(model, seed=1)
    before = frozen(model)
    with pytest.raises(OptionError, match="Layer 0 has 4 attention matrices, so 5 of them"):
        half_freeze(model, counts={"attention": (5,)})
    assert frozen(model) == before
