"""Projections that one side stores together and the other apart, against transformers' own conversion and literal slicing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, write_checkpoint
from helpers.command import call

AutoModel: Any = transformers.AutoModelForCausalLM
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "lfm2_moe": {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def both_forms(folder: Path, kind: str) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """A mixture of experts as transformers holds it and as it saves it, and its configuration."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MIXTURES[kind]})
    model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    held = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    saved = read_checkpoint(folder)
    assert held.keys() != saved.keys()
    return held, saved, json.loads((folder / "config.json").read_text())


def outputs(folder: Path, pre: Tensors, other: Tensors, ft: Tensors, config: dict[str, Any], *edit: str) -> Tensors:
    """What an edit writes with pre in another form than ft; extract and apply must give the same, and pre in ft's form."""
    for name, tensors in (("pre", pre), ("other", other), ("ft", ft)):
        write_checkpoint(folder / name, {name: t.contiguous() for name, t in tensors.items()}, config=config)
    for base in ("pre", "other"):
        code, _, err = call(*edit[:1], "--pre", base, "--ft", "ft", *edit[1:], "--out", f"out-{base}", cwd=folder)
        assert code == 0, err
    extract = ("--method", edit[0], *edit[1:], "--out", "task.safetensors")
    code, _, err = call("extract", "--pre", "other", "--ft", "ft", *extract, cwd=folder)
    assert code == 0, err
    code, _, err = call("apply", "--pre", "other", "--delta", "task.safetensors", "--out", "again", cwd=folder)
    assert code == 0, err
    found, wanted, again = (read_checkpoint(folder / name) for name in ("out-other", "out-pre", "again"))
    assert found.keys() == ft.keys()
    for name in ft:
        assert torch.equal(found[name], wanted[name]), name
        assert torch.equal(again[name], wanted[name]), name
    return found


def changed(out: Tensors, ft: Tensors, words: tuple[str, ...]) -> bool:
    """Whether the edit touched every weight whose name has one of the words."""
    names = [name for name in ft if any(word in f"{name}." for word in words) and not name.endswith("bias")]
    assert len(names) > 1
    return all(not torch.equal(out[name], ft[name]) for name in names)


@pytest.mark.parametrize("ft_is", ["held", "saved"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_stacked_and_one_by_one(tmp_path: Path, kind: str, ft_is: str) -> None:
    held, saved, config = both_forms(tmp_path / "model", kind)
    same, other = (held, saved) if ft_is == "held" else (saved, held)
    ft = fine_tuned(same)
    out = outputs(tmp_path, same, other, ft, config, "magnitude", "--sparsity", "0.5")
    assert changed(out, ft, ("down_proj", "output_linear", ".w2."))


def apart(tensors: Tensors, split: dict[str, tuple[str, ...]], rows: Any) -> Tensors:
    """The tensors with fused ones cut by a function of (name, tensor) into as many as there are names."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        leaf = name.split(".")[-2]
        if leaf in split:
            pieces = rows(leaf, tensor)
            found |= {name.replace(leaf, new): piece for new, piece in zip(split[leaf], pieces, strict=True)}
        else:
            found[name] = tensor
    return found


QKV = ("q_proj", "k_proj", "v_proj")


def phi3(leaf: str, tensor: torch.Tensor) -> Any:
    return (tensor[:32], tensor[32:48], tensor[48:]) if leaf == "qkv_proj" else tensor.chunk(2)


def by_head(_: str, tensor: torch.Tensor) -> Any:
    """Bloom's and GPT-NeoX's rows: head, then q, k and v."""
    heads = tensor.reshape(4, 3, 8, *tensor.shape[1:])
    return [heads[:, part].reshape(32, *tensor.shape[1:]) for part in range(3)]


def by_group(_: str, tensor: torch.Tensor) -> Any:
    """Falcon's newer rows: two groups, each of two queries, a key and a value."""
    groups = tensor.reshape(2, 4, 8, *tensor.shape[1:])
    cut = [groups[:, :2], groups[:, 2:3], groups[:, 3:]]
    return [part.reshape(-1, *tensor.shape[1:]) for part in cut]


def one_key(_: str, tensor: torch.Tensor) -> Any:
    return tensor[:32], tensor[32:40], tensor[40:]


def thirds(_: str, tensor: torch.Tensor) -> Any:
    return tensor.chunk(3)


def columns(leaf: str, tensor: torch.Tensor) -> Any:
    """GPT-2's [in, 3 · out], as three linear layers [out, in]."""
    return [part.T if part.dim() == 2 else part for part in tensor.chunk(3, dim=-1)]


def key_values(_: str, tensor: torch.Tensor) -> Any:
    return tensor[:32], tensor[32:48], tensor[48:]


FUSED: dict[str, tuple[dict[str, Any], dict[str, tuple[str, ...]], Any]] = {
    "phi3": ({"pad_token_id": 0}, {"qkv_proj": QKV, "gate_up_proj": ("gate_proj", "up_proj")}, phi3),
    "gpt_neox": ({}, {"query_key_value": QKV}, by_head),
    "bloom": ({"n_head": 4, "n_layer": 2}, {"query_key_value": QKV}, by_head),
    "falcon, groups": ({"new_decoder_architecture": True, "num_kv_heads": 2}, {"query_key_value": QKV}, by_group),
    "falcon, one key": ({"multi_query": True, "new_decoder_architecture": False}, {"query_key_value": QKV}, one_key),
    "gpt2": ({"n_head": 4, "n_layer": 2, "n_embd": 32}, {"c_attn": QKV}, columns),
    "gpt_bigcode, one key": ({"n_head": 4, "n_layer": 2, "n_embd": 32, "multi_query": True}, {"c_attn": QKV}, one_key),
    "gpt_bigcode, by head": ({"n_head": 4, "n_layer": 2, "n_embd": 32, "multi_query": False}, {"c_attn": QKV}, by_head),
    "mpt": ({"n_heads": 4, "n_layers": 2, "d_model": 32}, {"Wqkv": QKV}, thirds),
    "persimmon": ({}, {"query_key_value": QKV}, by_head),
    "falcon, by head": ({"multi_query": False, "new_decoder_architecture": False}, {"query_key_value": QKV}, by_head),
}


EDITS = (("magnitude", "--sparsity", "0.5"), ("half-reset", "--ratio", "1"))  # the second has biases go back too


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("ft_is", ["fused", "apart"])
@pytest.mark.parametrize("kind", FUSED)
def test_projections_fused_and_apart(tmp_path: Path, kind: str, ft_is: str, edit: tuple[str, ...]) -> None:
    more, split, rows = FUSED[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.split(",")[0], **{**SIZES, **more})
    fused = {name: tensor.detach().clone() for name, tensor in AutoModel.from_config(config).state_dict().items()}
    other = apart(fused, split, rows)
    assert len(other) > len(fused)
    same, other = (fused, other) if ft_is == "fused" else (other, fused)
    ft = fine_tuned(same)
    out = outputs(tmp_path, same, other, ft, config.to_dict(), *edit)
    assert changed(out, ft, ("qkv", "query_key_value", "c_attn") if ft_is == "fused" else QKV)


# Models whose code is not in transformers, or whose other parts do not matter: the tensor, and how its rows are laid.
REMOTE: dict[str, tuple[dict[str, Any], str, int, Any]] = {
    "internlm2": ({}, "attention.wqkv", 64, by_group),
    "qwen": ({}, "attn.c_attn", 96, thirds),
    "baichuan": ({}, "self_attn.W_pack", 96, thirds),
    "dbrx": ({"n_heads": 4, "attn_config": {"kv_n_heads": 2}}, "norm_attn_norm.attn.Wqkv", 64, key_values),
    "chatglm": (
        {"multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 8},
        "self_attention.query_key_value",
        64,
        key_values,
    ),
}


@pytest.mark.parametrize("ft_is", ["fused", "apart"])
@pytest.mark.parametrize("kind", REMOTE)
def test_projections_of_models_outside_transformers(tmp_path: Path, kind: str, ft_is: str) -> None:
    more, module, rows_, split = REMOTE[kind]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "model_type": kind}
    sizes |= {"num_key_value_heads": 2} if kind == "internlm2" else {}
    torch.manual_seed(0)
    fused: Tensors = {"model.embed_tokens.weight": torch.randn(64, 32)}
    for layer in range(2):
        name = f"model.layers.{layer}.{module}"
        fused |= {f"{name}.weight": torch.randn(rows_, 32), f"{name}.bias": torch.randn(rows_)}
    other = apart(fused, {module.rpartition(".")[2]: QKV}, split)
    same, other = (fused, other) if ft_is == "fused" else (other, fused)
    ft = fine_tuned(same)
    out = outputs(tmp_path, same, other, ft, {**sizes, **more}, *EDITS[1])
    assert changed(out, ft, (module.rpartition(".")[2],) if ft_is == "fused" else QKV)


def test_a_fused_projection_of_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    fused = {
        "model.embed_tokens.weight": torch.randn(64, 32),
        "model.layers.0.attn.qkv_proj.weight": torch.randn(96, 32),
    }
    other = apart(fused, {"qkv_proj": QKV}, thirds)
    config = {"hidden_size": 32, "num_attention_heads": 4, "model_type": "codegen"}
    write_checkpoint(tmp_path / "pre", other, config=config)
    write_checkpoint(tmp_path / "ft", fused, config=config)
    code, _, err = call("magnitude", "--pre", "pre", "--ft", "ft", "--sparsity", "0.5", cwd=tmp_path)
    assert code == 1
    assert "qkv_proj" in err


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("form", ["gate and up apart", "as linear layers"])
@pytest.mark.parametrize("ft_is", ["stacked", "apart"])
@pytest.mark.parametrize("intermediate", [24, 32])
def test_gpt_oss_whose_stacked_experts_are_transposed(
    tmp_path: Path, form: str, ft_is: str, intermediate: int, edit: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    sizes = {
        **SIZES,
        "intermediate_size": intermediate,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    }
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    model = AutoModel.from_config(config)
    stacked = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    other: Tensors = {}
    for name, tensor in stacked.items():
        if ".experts." not in name:
            other[name] = tensor
            continue
        before, leaf = name.rsplit(".", 1)
        kind = "bias" if leaf.endswith("_bias") else "weight"
        for number, expert in enumerate(tensor):
            # The rows of gate and up take turns in the model's own forward pass: gate_up[..., ::2], gate_up[..., 1::2].
            linear = expert if kind == "bias" else expert.T
            if leaf.startswith("down"):
                middle = "down_projs.{}" if form == "as linear layers" else "{}.down_proj"
                other[f"{before}.{middle.format(number)}.{kind}"] = linear
            elif form == "as linear layers":
                other[f"{before}.gate_up_projs.{number}.{kind}"] = linear
            else:
                other[f"{before}.{number}.gate_proj.{kind}"] = linear[0::2]
                other[f"{before}.{number}.up_proj.{kind}"] = linear[1::2]
    same, other = (stacked, other) if ft_is == "stacked" else (other, stacked)
    ft = fine_tuned(same)
    out = outputs(tmp_path, same, other, ft, config.to_dict(), *edit)
    assert changed(out, ft, ("_proj",))


def test_a_lost_expert_is_said(tmp_path: Path) -> None:
    held, saved, config = both_forms(tmp_path / "model", "mixtral")
    lost = next(name for name in saved if ".experts.3." in name)
    write_checkpoint(tmp_path / "whole", held, config=config)
    write_checkpoint(tmp_path / "part", {name: t for name, t in saved.items() if name != lost}, config=config)
    for pre, ft, side in (("whole", "part", "ft is incomplete"), ("part", "whole", "pre is incomplete")):
        code, _, err = call("magnitude", "--pre", pre, "--ft", ft, "--sparsity", "0.5", "--out", "out", cwd=tmp_path)
        said = " ".join(err.split())
        assert code == 1
        assert side in said
        assert "expert 3" in said


@pytest.mark.parametrize("ft_is", ["held", "saved"])
def test_a_merge_of_models_in_two_forms_and_verify(tmp_path: Path, ft_is: str) -> None:
    held, saved, config = both_forms(tmp_path / "model", "qwen3_moe")
    same, other = (held, saved) if ft_is == "held" else (saved, held)
    # The second model is moved so that both of its forms hold the same numbers.
    moved = [{name: tensor + 0.25 * tensor.sign() for name, tensor in form.items()} for form in (same, other)]
    for name, tensors in (("pre", other), ("ft", fine_tuned(same)), ("second", moved[0]), ("second-other", moved[1])):
        write_checkpoint(tmp_path / name, tensors, config=config)
    for second in ("second", "second-other"):
        sides = ("--pre", "pre", "--ft", "ft", "--ft", second)
        code, _, err = call("ties", *sides, "--sparsity", "0.5", "--out", f"out-{second}", cwd=tmp_path)
        assert code == 0, err
    one, two = (read_checkpoint(tmp_path / f"out-{name}") for name in ("second", "second-other"))
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = call("magnitude", "--pre", "pre", "--ft", "ft", "--sparsity", "0.5", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    code, out, err = call("verify", "out", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 0, out + err
    code, out, err = call("diff", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 0, out + err
