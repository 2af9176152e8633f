"""What peft adds beyond plain LoRA, against what peft's own merge_and_unload makes of it: tensor by tensor, bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import Made, assert_is_merged, assert_same, fill, load, make, reload
from helpers.checkpoints import read_checkpoint
from helpers.families import FAMILIES, Family
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from surgery.__main__ import main
from surgery.errors import CheckpointError

UNTIED_GPT2 = Family("GPT2Config", {**FAMILIES["gpt2"].kwargs, "tie_word_embeddings": False})
KINDS: dict[str, tuple[Family, dict[str, Any]]] = {
    "dora": (FAMILIES["llama"], {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True}),
    "dora of an embedding": (FAMILIES["llama"], {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora of conv1d": (FAMILIES["gpt2"], {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True}),
    "dora of a convolution": (FAMILIES["vit"], {"target_modules": ["projection"], "use_dora": True}),
    "convolution": (FAMILIES["vit"], {"target_modules": ["projection"]}),
    "convolution over time": (FAMILIES["whisper"], {"target_modules": ["conv1", "conv2", "fc1"]}),
    "bias of lora": (FAMILIES["qwen2"], {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "tokens": (FAMILIES["llama"], {"target_modules": ["q_proj"], "trainable_token_indices": [1, 98, 7]}),
    "tokens of a tied embedding": (
        FAMILIES["qwen2"],
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ),
    "tokens by module": (
        FAMILIES["llama"],
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}},
    ),
    "stacked experts": (
        FAMILIES["mixtral"],
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    "one parameter of the experts": (
        FAMILIES["mixtral"],
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj"],
            "rank_pattern": {r"layers.1.mlp.experts.gate_up_proj": 2},
        },
    ),
    "experts of qwen3": (
        FAMILIES["qwen3_moe"],
        {
            "target_modules": ["gate"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "use_rslora": True,
        },
    ),
    "experts of llama4": (
        FAMILIES["llama4_text"],
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts and router of gpt-oss": (
        FAMILIES["gpt_oss"],
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        },
    ),
    "square experts of gpt-oss": (
        Family("GptOssConfig", {**FAMILIES["gpt_oss"].kwargs, "intermediate_size": 32}),
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "minor components": (FAMILIES["llama"], {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "pissa": (FAMILIES["llama"], {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "pissa of conv1d": (FAMILIES["gpt2"], {"target_modules": ["c_attn", "attn.c_proj"], "init_lora_weights": "pissa"}),
    "pissa and dora": (
        FAMILIES["llama"],
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True},
    ),
    "olora": (FAMILIES["llama"], {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "olora"}),
    "ia3": (
        FAMILIES["qwen2"],
        {
            "config": IA3Config,
            "target_modules": ["k_proj", "o_proj", "down_proj"],
            "feedforward_modules": ["down_proj", "o_proj"],
        },
    ),
    "ia3 of conv1d": (
        FAMILIES["gpt2"],
        {
            "config": IA3Config,
            "target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj", "attn.c_proj"],
        },
    ),
    "adalora": (
        FAMILIES["llama"],
        {
            "config": AdaLoraConfig,
            "init_r": 6,
            "lora_alpha": 5,
            "total_step": 9,
            "target_modules": ["q_proj", "up_proj"],
        },
    ),
    "adalora of conv1d": (
        FAMILIES["gpt2"],
        {"config": AdaLoraConfig, "init_r": 3, "total_step": 9, "target_modules": ["c_attn", "attn.c_proj"]},
    ),
    "vera": (
        FAMILIES["llama"],
        {"config": VeraConfig, "r": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    ),
    "vera of conv1d": (
        FAMILIES["gpt2"],
        {"config": VeraConfig, "r": 6, "fan_in_fan_out": True, "target_modules": ["c_attn", "attn.c_proj"]},
    ),
    "fourierft": (
        FAMILIES["llama"],
        {"config": FourierFTConfig, "n_frequency": 40, "scaling": 9.0, "target_modules": ["q_proj", "down_proj"]},
    ),
    "fourierft of conv1d": (
        FAMILIES["gpt2"],
        {
            "config": FourierFTConfig,
            "n_frequency": 40,
            "fan_in_fan_out": True,
            "target_modules": ["c_attn", "attn.c_proj"],
        },
    ),
    "loha": (
        FAMILIES["llama"],
        {
            "config": LoHaConfig,
            "r": 3,
            "alpha": 5,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2},
        },
    ),
    "loha of a convolution": (
        FAMILIES["vit"],
        {"config": LoHaConfig, "r": 3, "alpha": 5, "target_modules": ["projection"]},
    ),
    "lokr": (FAMILIES["llama"], {"config": LoKrConfig, "r": 3, "alpha": 5, "target_modules": ["k_proj", "down_proj"]}),
    "lokr of factors": (
        FAMILIES["llama"],
        {
            "config": LoKrConfig,
            "r": 2,
            "alpha": 5,
            "target_modules": ["q_proj", "down_proj"],
            "decompose_both": True,
            "decompose_factor": 8,
        },
    ),
    "lokr of a convolution": (
        FAMILIES["vit"],
        {"config": LoKrConfig, "r": 4, "alpha": 5, "target_modules": ["projection"], "use_effective_conv2d": True},
    ),
    "norms": (FAMILIES["llama"], {"config": LNTuningConfig, "target_modules": ["input_layernorm"]}),
    "tokens alone": (FAMILIES["qwen2"], {"config": TrainableTokensConfig, "token_indices": [5, 2]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_is_what_peft_merges(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    assert_is_merged(make(tmp_path, family, dtype=dtype, **options))


@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        "dora of an embedding",
        "dora of conv1d",
        "convolution",
        "tokens",
        "stacked experts",
        "square experts of gpt-oss",
        "olora",
        "ia3 of conv1d",
        "loha",
        "lokr of factors",
    ],
)
def test_any_part_of_a_tensor_has_the_bytes_of_the_whole(kind: str, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    made = make(tmp_path, family, dtype=torch.bfloat16, **options)
    rng = np.random.default_rng(0)
    changed = [tensor for tensor in made.ours.values() if tensor.path.parent != made.base]
    for tensor in changed[:6]:
        whole = fill(tensor)
        with tensor.open() as reader:
            for _ in range(40):
                begin, end = sorted(rng.integers(0, tensor.nbytes + 1, 2).tolist())
                part = bytearray(end - begin)
                reader.fill(begin, memoryview(part))
                assert bytes(part) == whole[begin:end], (tensor.name, begin, end)


ODD = {
    "a number": torch.tensor(1.0),
    "nothing": torch.ones(0, 2),
    "a line": torch.ones(3),
    "a block": torch.ones(2, 2, 2),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        "convolution",
        "bias of lora",
        "tokens",
        "stacked experts",
        "one parameter of the experts",
        "ia3",
        "loha",
        "lokr",
        "adalora",
    ],
)
def test_tensors_of_odd_shapes_are_refused(kind: str, odd: str, tmp_path: Path) -> None:
    """Each of one layer in turn: before anything is read of it."""
    family, options = KINDS[kind]
    made = make(tmp_path, family, **options)
    path = made.adapter / "adapter_model.safetensors"
    good = load_file(path)
    for key in list(good)[:4]:
        save_file({**good, key: ODD[odd]}, path)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            _ = made.ours


def test_adalora_after_it_dealt_out_its_ranks(tmp_path: Path) -> None:
    """The layers end at other ranks than they began with, and are scaled by the first one."""
    model = FAMILIES["llama"].build(1)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    config = AdaLoraConfig(
        init_r=6,
        target_r=3,
        total_step=6,
        tinit=1,
        tfinal=1,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    trained: Any = get_peft_model(reload(model, tmp_path / "base", None), config)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.01)
    ids = torch.arange(10)[None]
    for step in range(7):
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        trained.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    trained.save_pretrained(str(tmp_path / "adapter"))
    shapes = {
        len(tensor)
        for key, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if "lora_A" in key
    }
    assert len(shapes) > 1
    merged = PeftModel.from_pretrained(
        reload(model, tmp_path / "base", None), str(tmp_path / "adapter")
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    made = Made(tmp_path / "base", tmp_path / "adapter", read_checkpoint(tmp_path / "merged"), tmp_path)
    for name, tensor in made.ours.items():
        assert_same(load(tensor), made.merged[name], name)


TIED: dict[str, dict[str, Any]] = {
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora on an embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a whole embedding and a whole head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "a whole embedding, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "nothing of the two": {"target_modules": ["q_proj"]},
}
STAYS_TIED = ("both, tied", "a whole embedding, tied", "tokens", "nothing of the two")


# peft does not save the new rows of the embedding where only the head is targeted.
@pytest.mark.parametrize(
    ("case", "rows"), [(case, rows) for case in TIED for rows in (None, 120) if (case, rows) != ("a head", 120)]
)
def test_the_result_computes_what_the_trained_model_computed(case: str, rows: int | None, tmp_path: Path) -> None:
    """Where peft's merge would move the head with the embedding that it is tied to, the trained model tells."""
    made = make(tmp_path, FAMILIES["qwen2"], rows=rows, **TIED[case])
    out = tmp_path / "out"
    assert main(["fapm", "--sparsity", "0", "--pre", str(made.base), "--ft", str(made.adapter), "--out", str(out)]) == 0
    base = AutoModelForCausalLM.from_pretrained(made.base)
    if rows:
        torch.manual_seed(3)
        base.resize_token_embeddings(rows)
    tuned = PeftModel.from_pretrained(base, str(made.adapter)).eval()
    written = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[1, 2, 5, 98, 7]])
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, tuned(ids).logits, atol=1e-5, rtol=1e-5)
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied is (case in STAYS_TIED)
    assert ("lm_head.weight" in read_checkpoint(out)) is not tied


def test_vera_without_its_projections_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES["llama"], config=VeraConfig, r=6, target_modules=["q_proj"], save_projection=False)
    with pytest.raises(CheckpointError, match="save_projection=False"):
        _ = made.ours


def test_the_command_that_a_refused_adapter_is_answered_with_merges_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path, FAMILIES["llama"], config=OFTConfig, oft_block_size=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="type OFT") as refusal:
        _ = made.ours
    code = re.search(r'`python -c "(.*)"`', str(refusal.value))
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace("'ADAPTER'", "'adapter'").replace("'MERGED'", "'by hand'"), {})
    found = read_checkpoint(tmp_path / "by hand")
    assert found.keys() == made.merged.keys()
    assert all(torch.equal(found[name], made.merged[name]) for name in found)
