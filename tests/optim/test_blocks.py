"""Q, K and V that one tensor holds: which rows are whose, by what the model computes; and MoFO's step of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.families import FAMILIES
from helpers.reference.mofo import Mofo
from torch import nn

from surgery.optim import MoFO, fused_blocks
from surgery.optim.blocks import K, Q, V

SMALL = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
FALCON = {**SMALL, "alibi": False, "bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 32}),
    "bloom": ("BloomConfig", SMALL),
    "falcon": ("FalconConfig", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon by head": ("FalconConfig", {**FALCON, "multi_query": False, "new_decoder_architecture": False}),
    "falcon by group": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("GPT2Config", {"vocab_size": 40, "n_embd": 24, "n_layer": 1, "n_head": 4}),
    "phi3": ("Phi3Config", {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 0}),
    "mpt": ("MptConfig", {"vocab_size": 40, "d_model": 24, "n_layers": 1, "n_heads": 4}),
    "codegen": ("CodeGenConfig", {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"vocab_size": 40, "n_embd": 24, "n_layer": 1, "n_head": 4}),
    "persimmon": ("PersimmonConfig", {**SMALL, "hidden_size": 32, "intermediate_size": 32, "qk_layernorm": False}),
}


def built(name: str) -> Any:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def rows(size: int, runs: tuple[tuple[int, int], ...], block: int) -> torch.Tensor:
    """The rows of a block, counted out one by one."""
    labels: list[int] = []
    while len(labels) < size:
        for number, count in runs:
            labels += [number] * count
    assert len(labels) == size
    return torch.tensor([row for row, label in enumerate(labels) if label == block])


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_whose_the_model_makes_it(name: str) -> None:
    """Without V there is nothing to attend to; without Q, or without K, all places weigh the same."""
    model = built(name)
    blocks = fused_blocks(model)
    assert blocks
    heard: list[torch.Tensor] = []
    inner = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("dense", "c_proj", "out_proj", "o_proj"))
    }
    out = next(module for name, module in inner.items() if "attn" in name or "attention" in name)
    out.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach().clone()))
    start = {parameter: parameter.detach().clone() for parameter in blocks}

    def without(block: int) -> torch.Tensor:
        with torch.no_grad():
            for parameter, (dim, runs) in blocks.items():
                parameter.copy_(start[parameter])
                parameter.index_fill_(dim, rows(parameter.shape[dim], runs, block), 0.0)
            heard.clear()
            model(torch.arange(8)[None])
        return heard[0]

    assert not without(V).any()
    torch.testing.assert_close(without(Q), without(K))
    assert without(Q).any()
    sizes = {block: [len(rows(p.shape[dim], runs, block)) for p, (dim, runs) in blocks.items()] for block in (Q, K, V)}
    assert sizes[K] == sizes[V]


def test_a_model_that_stores_them_apart_has_no_such_tensor() -> None:
    assert not fused_blocks(FAMILIES["llama"].build())
    assert not fused_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "phi3"])
@pytest.mark.parametrize("score", ["momentum", "gradient"])
def test_each_block_takes_the_step_of_the_reference(name: str, score: str) -> None:
    model = built(name).double()
    ((parameter, (dim, runs)), *_) = fused_blocks(model).items()
    places = [rows(parameter.shape[dim], runs, block) for block in (Q, K, V)]
    optimizer = MoFO([parameter], lr=0.01, alpha=0.15, filter=score, blocks=fused_blocks(model))
    references = [
        Mofo(parameter.detach().index_select(dim, at).flatten().numpy(), "0.15", 0.01, 0.9, 0.999, 1e-8, 0.0)
        for at in places
    ]
    for step in range(3):
        before = parameter.detach().clone()
        # The scales of Q, K and V differ, so that one filter over all of them would choose otherwise.
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for factor, at in enumerate(places, 1):
            gradient.index_copy_(dim, at, gradient.index_select(dim, at) * 10.0**factor)
        parameter.grad = gradient
        optimizer.step()
        for at, reference in zip(places, references, strict=True):
            chosen = np.array(reference.step(gradient.index_select(dim, at).flatten().numpy(), score))
            now, then = (tensor.index_select(dim, at).flatten().numpy() for tensor in (parameter.detach(), before))
            assert (now == then)[~chosen].all()
            np.testing.assert_allclose(now, reference.theta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
def test_blocks_in_one_tensor_are_tensors_of_their_own(dtype: torch.dtype, rounding: str) -> None:
    model = built("gpt_neox").to(dtype)
    ((parameter, (dim, runs)), *_) = fused_blocks(model).items()
    places = [rows(parameter.shape[dim], runs, block) for block in (Q, K, V)]
    apart = [nn.Parameter(parameter.detach().index_select(dim, at)) for at in places]
    options: dict[str, Any] = {"lr": 0.01, "alpha": 0.1, "rounding": rounding, "weight_decay": 0.1}
    one, other = MoFO([parameter], blocks=fused_blocks(model), **options), MoFO(apart, **options)
    for step in range(2):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        for at, part in zip(places, apart, strict=True):
            part.grad = parameter.grad.index_select(dim, at)
        one.step()
        other.step()
    for at, part in zip(places, apart, strict=True):
        found = parameter.detach().index_select(dim, at)
        if rounding == "stochastic" and dtype == torch.bfloat16:
            torch.testing.assert_close(found, part.detach(), rtol=0.02, atol=0.02)  # each draws its own numbers
        else:
            assert torch.equal(found, part)
