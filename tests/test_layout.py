"""`surgery.layout` against real models, and against hand-written examples.

The check on models does not read names. Every parameter of a tiny model is filled with a number that stands for what
the module tree says about it: the block it lies in, and the classes of the modules around it. What `save_pretrained`
writes is then recognised by its numbers, whatever it is called on disk and however stacked experts were split.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.families import CORE, FAMILIES, Family
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from surgery.layout import CATEGORIES, Place, module, place, unit

# (layer, category, block list or "", side)
Expected = tuple[int | None, str, str, str]

# Modules whose class says nothing (nn.Linear, nn.Conv1d, nn.Parameter), by hand.
IN_BLOCK = {"gate": "router", "shared_expert_gate": "router", "fc1": "feed_forward", "fc2": "feed_forward"}
OUTSIDE = {
    "model.decoder.project_in": ("embedding", "input"),  # OPT-350m
    "model.decoder.project_out": ("head", "output"),
    "cls.predictions": ("head", "output"),  # BERT
    "bert.pooler.dense": ("head", "output"),
    "classifier": ("head", "output"),  # BERT, ViT
    "qa_outputs": ("head", "output"),
    "lm_head": ("head", "output"),  # RoBERTa's has layers of its own
    "score": ("head", "output"),
    "pooler.dense": ("head", "output"),  # ViT
    "model.encoder.conv1": ("embedding", "input"),  # Whisper
    "model.encoder.conv2": ("embedding", "input"),
    "vit.embeddings": ("embedding", "input"),
    "embeddings": ("embedding", "input"),
    "model.vision_tower.embeddings": ("embedding", "input"),  # Gemma 3
    "model.multi_modal_projector": ("embedding", "input"),
    "vision_model": ("embedding", "input"),  # Llama 4: what is in no block and no norm
    "multi_modal_projector": ("embedding", "input"),
}
NORMS_OF_EMBEDDINGS = {
    "bert.embeddings.LayerNorm",
    "roberta.embeddings.LayerNorm",
    "transformer.word_embeddings_layernorm",
    "model.multi_modal_projector.mm_soft_emb_norm",
    "vision_model.layernorm_pre",
}


def expected(model: PreTrainedModel, family: Family, name: str) -> Expected:
    """What the module tree of `model` says about its parameter or buffer `name`."""
    path = name.rpartition(".")[0]
    owner = model.get_submodule(path)
    is_norm = "Norm" in type(owner).__name__
    for blocks in family.blocks:
        if not path.startswith(f"{blocks}."):
            continue
        index, _, inner = path[len(blocks) + 1 :].partition(".")
        assert isinstance(model.get_submodule(blocks), nn.ModuleList)
        steps = inner.split(".")
        around = [
            type(model.get_submodule(".".join([blocks, index, *steps[:n]]))).__name__ for n in range(1, len(steps) + 1)
        ]
        if is_norm:
            category = "norm"
        elif any(re.search("Router|Gate$", each) for each in around):
            category = "router"
        elif any(re.search("Attention|Attn|Mixer", each) for each in around):
            category = "attention"
        elif steps[-1] in IN_BLOCK:
            category = IN_BLOCK[steps[-1]]
        else:
            assert any(re.search("MLP|Mlp|MoE|Moe|Experts|LayerFF|Intermediate|Output", e) for e in around), around
            category = "feed_forward"
        return int(index), category, blocks, "layer"
    if is_norm:
        return None, "norm", "", "input" if path in NORMS_OF_EMBEDDINGS else "output"
    if owner is model.get_output_embeddings():  # type: ignore[no-untyped-call]
        return None, "head", "", "output"
    if isinstance(owner, nn.Embedding):
        return None, "embedding", "", "input"
    known = [each for each in OUTSIDE if f"{name}.".startswith(f"{each}.")]
    assert known, f"say in OUTSIDE what {name} is"
    return None, OUTSIDE[known[0]][0], "", OUTSIDE[known[0]][1]


def seen(name: str) -> Expected:
    found = place(name)
    assert not found.buffer, name
    return found.layer, found.category, found.stack, found.side


@pytest.mark.parametrize("key", FAMILIES)
def test_every_tensor_of_a_family(key: str, tmp_path: Path) -> None:
    family = FAMILIES[key]
    model = family.build()
    state = model.state_dict()
    wanted = {name: expected(model, family, name) for name in state}

    # In memory.
    assert {name: seen(name) for name in state} == wanted

    # On disk. Tied tensors share a number, that of the first name.
    facts = sorted(set(wanted.values()), key=str)
    tied: dict[int, str] = {}
    for name, tensor in state.items():
        first = tied.setdefault(tensor.data_ptr(), name)
        tensor.fill_(facts.index(wanted[first]) + 1)
    model.save_pretrained(tmp_path)
    disk = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(disk) >= 10
    stacks: dict[str, str] = {}  # as in memory -> as on disk
    for name, tensor in disk.items():
        codes = set(tensor.flatten().tolist())
        assert len(codes) == 1, f"{name} mixes tensors that differ in layer or category"
        layer, category, stack, side = wanted[name] if name in wanted else facts[int(codes.pop()) - 1]
        assert seen(name) == (layer, category, stacks.setdefault(stack, place(name).stack), side), name
    assert len(set(stacks.values())) == len(stacks) == len(family.blocks) + 1

    # No layer is missing, and each has attention, a feed-forward part (but in Mamba) and a norm.
    for stack in family.blocks:
        parts = {"attention", "norm"} | ({"feed_forward"} if key != "mamba" else set())
        for index in range(len(model.get_submodule(stack))):  # type: ignore[arg-type]
            here = {p.category for p in map(place, disk) if (p.stack, p.layer) == (stacks[stack], index)}
            assert parts <= here <= parts | {"router"}, (stack, index)


def test_families_have_what_they_are_there_for() -> None:
    assert len(CORE) == 10
    assert set(CORE) <= set(FAMILIES)
    for key in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "llama4_text", "gpt_oss"):
        assert "router" in {place(name).category for name in FAMILIES[key].build().state_dict()}, key


@pytest.mark.parametrize("key", FAMILIES)
def test_buffers_of_a_family(key: str) -> None:
    """Whatever a model registers as a buffer is one by name too, but for the router's correction, which is learnt."""
    for name, _ in FAMILIES[key].build().named_buffers():
        correction = name.endswith("e_score_correction_bias")
        assert place(name).buffer != correction, name
        assert place(name).category == ("router" if correction else "other"), name


@pytest.mark.parametrize("key", FAMILIES)
def test_units_are_modules(key: str) -> None:
    """A weight's unit is its module, and takes the bias along."""
    model = FAMILIES[key].build()
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias", "e_score_correction_bias"):
            assert unit(name) == owner
        elif leaf.endswith("_bias") and leaf.removesuffix("_bias") in dict(
            model.get_submodule(owner).named_parameters()
        ):
            assert unit(name) == unit(name.removesuffix("_bias")) == name.removesuffix("_bias")


IN_LAYER: list[tuple[str, int, str, str]] = [
    # no prefix, as on the hub, and every wrapper
    ("h.0.attn.c_attn.weight", 0, "attention", "h"),
    ("h.0.attn.c_attn.bias", 0, "attention", "h"),
    ("h.11.mlp.c_proj.weight", 11, "feed_forward", "h"),
    ("h.11.ln_2.bias", 11, "norm", "h"),
    ("layers.7.self_attn.q_proj.weight", 7, "attention", "layers"),
    ("language_model.model.layers.5.mlp.up_proj.weight", 5, "feed_forward", "language_model.model.layers"),
    ("model.language_model.layers.5.mlp.up_proj.weight", 5, "feed_forward", "model.language_model.layers"),
    ("_orig_mod.model.layers.5.mlp.up_proj.weight", 5, "feed_forward", "model.layers"),
    ("module.model.layers.5.mlp.up_proj.weight", 5, "feed_forward", "model.layers"),
    ("module._orig_mod.transformer.h.5.attn.c_proj.bias", 5, "attention", "transformer.h"),
    ("model.layers.5._fsdp_wrapped_module.input_layernorm._orig_mod.weight", 5, "norm", "model.layers"),
    ("base_model.model.model.layers.5.self_attn.q_proj.lora_A.default.weight", 5, "attention", "model.layers"),
    # the index of the layer, not of an expert, a sub-layer or a head
    ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3, "feed_forward", "model.layers"),
    ("model.layers.3.mlp.experts.7.gate_proj.weight", 3, "feed_forward", "model.layers"),
    ("encoder.block.4.layer.1.DenseReluDense.wi_0.weight", 4, "feed_forward", "encoder.block"),
    ("decoder.block.4.layer.2.layer_norm.weight", 4, "norm", "decoder.block"),
    ("model.layers.2.self_attn.q_layernorm.norms.31.weight", 2, "norm", "model.layers"),
    # gates that route, and those that do not
    ("model.layers.3.mlp.gate.weight", 3, "router", "model.layers"),
    ("model.layers.3.mlp.gate.e_score_correction_bias", 3, "router", "model.layers"),
    ("model.layers.3.block_sparse_moe.gate.weight", 3, "router", "model.layers"),
    ("model.layers.3.block_sparse_moe.e_score_correction_bias", 3, "router", "model.layers"),
    ("model.layers.3.mlp.shared_expert_gate.weight", 3, "router", "model.layers"),
    ("model.layers.3.feed_forward.router.weight", 3, "router", "model.layers"),
    ("model.layers.3.mlp.router.bias", 3, "router", "model.layers"),
    ("model.layers.3.block_sparse_moe.router.layer.weight", 3, "router", "model.layers"),
    ("model.layers.3.mlp.gate_proj.weight", 3, "feed_forward", "model.layers"),
    ("model.layers.3.mlp.gate_up_proj.weight", 3, "feed_forward", "model.layers"),
    ("model.layers.3.mlp.shared_experts.gate_proj.weight", 3, "feed_forward", "model.layers"),
    ("model.layers.3.self_attn.gate.weight", 3, "attention", "model.layers"),
    # stacked experts have no .weight
    ("model.layers.3.mlp.experts.gate_up_proj", 3, "feed_forward", "model.layers"),
    ("model.layers.3.mlp.experts.gate_up_proj_bias", 3, "feed_forward", "model.layers"),
    ("model.layers.3.feed_forward.experts.down_proj", 3, "feed_forward", "model.layers"),
    # norms with attention or mlp in their names or around them; attention with norm around it
    ("model.layers.3.post_attention_layernorm.weight", 3, "norm", "model.layers"),
    ("model.layers.3.post_mlp_layernorm.weight", 3, "norm", "model.layers"),
    ("model.layers.3.self_attn.k_norm.weight", 3, "norm", "model.layers"),
    ("model.layers.3.self_attn.kv_a_layernorm.weight", 3, "norm", "model.layers"),
    ("transformer.h.3.ln_mlp.weight", 3, "norm", "transformer.h"),
    ("transformer.blocks.3.attn.q_ln.weight", 3, "norm", "transformer.blocks"),
    ("bert.encoder.layer.3.attention.output.LayerNorm.gamma", 3, "norm", "bert.encoder.layer"),
    ("bert.encoder.layer.3.attention.output.dense.weight", 3, "attention", "bert.encoder.layer"),
    ("bert.encoder.layer.3.output.dense.bias", 3, "feed_forward", "bert.encoder.layer"),
    ("model.decoder.layers.3.final_layer_norm.weight", 3, "norm", "model.decoder.layers"),
    # parameters that look like buffers
    ("h.3.self_attention.dense.bias", 3, "attention", "h"),
    ("h.3.self_attention.query_key_value.bias", 3, "attention", "h"),
    ("gpt_neox.layers.3.attention.dense.bias", 3, "attention", "gpt_neox.layers"),
    ("gpt_neox_japanese.layers.3.attention.dense_bias", 3, "attention", "gpt_neox_japanese.layers"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0, "attention", "encoder.block"),
    ("model.layers.3.self_attn.sinks", 3, "attention", "model.layers"),
    # other ways to write the same
    ("layers.3.attention.wq.weight", 3, "attention", "layers"),
    ("layers.3.feed_forward.w1.weight", 3, "feed_forward", "layers"),
    ("layers.3.ffn_norm.weight", 3, "norm", "layers"),
    ("transformer.resblocks.3.attn.in_proj_bias", 3, "attention", "transformer.resblocks"),
    ("encoder.layers.3.linear1.weight", 3, "feed_forward", "encoder.layers"),
    ("visual.blocks.3.attn.qkv.weight", 3, "attention", "visual.blocks"),
    ("backbone.layers.3.mixer.A_log", 3, "attention", "backbone.layers"),
    ("model.layers.3.mamba.conv1d.bias", 3, "attention", "model.layers"),
    ("model.layers.3.temporal_block.linear_y.weight", 3, "attention", "model.layers"),
    ("model.layers.3.conv.in_proj.weight", 3, "attention", "model.layers"),
    # Nemotron-H calls everything a mixer
    ("backbone.layers.3.mixer.q_proj.weight", 3, "attention", "backbone.layers"),
    ("backbone.layers.3.mixer.up_proj.weight", 3, "feed_forward", "backbone.layers"),
    ("backbone.layers.3.mixer.experts.7.down_proj.weight", 3, "feed_forward", "backbone.layers"),
    ("backbone.layers.3.mixer.gate.weight", 3, "router", "backbone.layers"),
    ("backbone.layers.3.mixer.norm.weight", 3, "norm", "backbone.layers"),
    # DeepSeek-V3's layer for one more token
    ("model.layers.61.eh_proj.weight", 61, "embedding", "model.layers"),
    ("model.layers.61.hnorm.weight", 61, "norm", "model.layers"),
    ("model.layers.61.shared_head.norm.weight", 61, "norm", "model.layers"),
    ("model.layers.61.shared_head.head.weight", 61, "head", "model.layers"),
    # nothing is guessed
    ("model.layers.3.frobnicate.weight", 3, "other", "model.layers"),
    ("model.layers.3.weight", 3, "other", "model.layers"),
    # parts of quantised matrices
    ("model.layers.3.mlp.down_proj.weight_scale_inv", 3, "other", "model.layers"),
    ("model.layers.3.self_attn.q_proj.qweight", 3, "other", "model.layers"),
    ("model.layers.3.mlp.experts.gate_up_proj_scales", 3, "other", "model.layers"),
]


@pytest.mark.parametrize(("name", "layer", "category", "stack"), IN_LAYER)
def test_in_a_layer(name: str, layer: int, category: str, stack: str) -> None:
    assert place(name) == Place(layer, category, stack, "layer")


OUT_OF_LAYERS: list[tuple[str, str, str]] = [
    ("wte.weight", "embedding", "input"),
    ("transformer.wpe.weight", "embedding", "input"),
    ("embed_tokens.weight", "embedding", "input"),
    ("module._orig_mod.model.embed_tokens.weight", "embedding", "input"),
    ("tok_embeddings.weight", "embedding", "input"),
    ("gpt_neox.embed_in.weight", "embedding", "input"),
    ("shared.weight", "embedding", "input"),
    ("bert.embeddings.token_type_embeddings.weight", "embedding", "input"),
    ("model.encoder.conv1.bias", "embedding", "input"),
    ("vit.embeddings.cls_token", "embedding", "input"),
    ("vit.embeddings.patch_embeddings.projection.weight", "embedding", "input"),
    ("multi_modal_projector.linear_1.weight", "embedding", "input"),
    ("model.connector.modality_projection.proj.weight", "embedding", "input"),
    ("visual.merger.mlp.0.weight", "embedding", "input"),
    ("visual.merger.ln_q.weight", "norm", "input"),
    ("mpnet.encoder.relative_attention_bias.weight", "attention", "input"),
    ("bert.embeddings.LayerNorm.beta", "norm", "input"),
    ("word_embeddings_layernorm.weight", "norm", "input"),
    ("model.encoder.layernorm_embedding.weight", "norm", "input"),
    ("vision_model.pre_layrnorm.weight", "norm", "input"),
    ("norm.weight", "norm", "output"),
    ("model.norm.weight", "norm", "output"),
    ("language_model.model.norm.weight", "norm", "output"),
    ("transformer.ln_f.bias", "norm", "output"),
    ("backbone.norm_f.weight", "norm", "output"),
    ("model.final_layernorm.weight", "norm", "output"),
    ("encoder.final_layer_norm.weight", "norm", "output"),
    ("lm_head.layer_norm.weight", "norm", "output"),
    ("cls.predictions.transform.LayerNorm.gamma", "norm", "output"),
    ("lm_head.weight", "head", "output"),
    ("output.weight", "head", "output"),
    ("embed_out.weight", "head", "output"),
    ("proj_out.weight", "head", "output"),
    ("score.weight", "head", "output"),
    ("classifier.out_proj.bias", "head", "output"),
    ("qa_outputs.weight", "head", "output"),
    ("bert.pooler.dense.weight", "head", "output"),
    ("cls.predictions.bias", "head", "output"),
    ("cls.seq_relationship.weight", "head", "output"),
    ("decoder.bias", "head", "output"),
    ("vocab_transform.weight", "head", "output"),
    ("generator_predictions.dense.weight", "head", "output"),
    ("vision_model.head.attention.in_proj_weight", "head", "output"),
    # nothing is guessed
    ("", "other", "input"),
    ("weight", "other", "input"),
    ("frobnicate.weight", "other", "input"),
    ("layers.weight", "other", "input"),
    ("layers.x.self.weight", "other", "input"),
    (f"layers.{'9' * 5000}.foo.weight", "other", "input"),
    ("..layers..0.é\n\x00İ.", "other", "input"),
]


@pytest.mark.parametrize(("name", "category", "side"), OUT_OF_LAYERS, ids=[each[0][:60] for each in OUT_OF_LAYERS])
def test_outside_the_layers(name: str, category: str, side: str) -> None:
    assert place(name) == Place(None, category, "", side)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("h.0.attn.bias", 0),
        ("h.0.attn.masked_bias", 0),
        ("transformer.h.5.attn.attention.bias", 5),
        ("transformer.h.5.attn.attention.masked_bias", 5),
        ("gpt_neox.layers.5.attention.bias", 5),
        ("gpt_neox.layers.5.attention.masked_bias", 5),
        ("gpt_neox.layers.5.attention.rotary_emb.inv_freq", 5),
        ("model.layers.5.self_attn.rotary_emb.inv_freq", 5),
        ("transformer.h.5.attn.embed_positions", 5),
        ("transformer.h.5.attn.causal_mask", 5),
        ("transformer.h.5.attn.attention.rope.freqs_cis", 5),
        ("encoder.layer.5.attention.self.relative_position_index", 5),
        ("model.layers.5.self_attn.rotary_emb.cos_cached", 5),
        ("model.encoder.embed_positions._float_tensor", None),
        ("backbone.bn1.running_mean", None),
        ("model.rotary_emb.inv_freq", None),
        ("rotary_emb.inv_freq", None),
        ("bert.embeddings.position_ids", None),
        ("bert.embeddings.token_type_ids", None),
        ("model.vision_tower.vision_model.embeddings.position_ids", None),
        ("final_logits_bias", None),
    ],
)
def test_buffers(name: str, layer: int | None) -> None:
    found = place(name)
    assert (found.buffer, found.category, found.layer) == (True, "other", layer)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.gate_up_proj"),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", "model.layers.0.mlp.experts.7.gate_proj"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.0.mlp.gate"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q"),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
        ("resblocks.0.attn.in_proj_weight", "resblocks.0.attn.in_proj"),
        ("resblocks.0.attn.in_proj_bias", "resblocks.0.attn.in_proj"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm"),
        ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm"),
        ("backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.A_log"),
        ("vit.embeddings.cls_token", "vit.embeddings.cls_token"),
        ("weight", "weight"),
        ("", ""),
        ("_bias", "_bias"),
    ],
)
def test_unit(name: str, module: str) -> None:
    assert unit(name) == module


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.11.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("module.model.layers.3._orig_mod.mlp.up_proj.weight", "mlp.up_proj"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "mlp.experts.#.up_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", "layer.1.DenseReluDense.wi"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.7.weight", "weight"),
        ("", ""),
    ],
)
def test_module(name: str, expected: str) -> None:
    assert module(name) == expected


def test_categories_are_the_ones_in_use() -> None:
    names = [each[0] for each in IN_LAYER] + [each[0] for each in OUT_OF_LAYERS]
    assert {place(name).category for name in names} == set(CATEGORIES)


def test_imports_nothing_heavy() -> None:
    code = "import sys, surgery.layout; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
