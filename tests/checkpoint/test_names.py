"""Names of the two sides, and what one side has: real transformers models, saved as people have them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call
from safetensors.torch import load_file, save_file

from surgery.layout import align, unwrapped

AutoModel: Any = transformers.AutoModelForCausalLM
Multimodal: Any = transformers.AutoModelForImageTextToText
NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}",
        "module.{}",
        "_fsdp_wrapped_module.{}",
        "base_model.model.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
    ],
)
def test_what_training_puts_before_a_name_is_taken_off(wrapped: str) -> None:
    assert [unwrapped(wrapped.format(name)) for name in NAMES] == list(NAMES)


def test_what_training_puts_into_a_name_is_taken_out() -> None:
    inner = "model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.self_attn._orig_mod.q_proj.weight"
    assert unwrapped(inner) == NAMES[0]


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_output_has_the_names_that_transformers_loads(tmp_path: Path, before: str, shards: int) -> None:
    config = text_config()
    model = AutoModel.from_config(config)
    pre = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    ft = fine_tuned(pre)
    held = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    write_checkpoint(tmp_path / "pre", pre, config=held)
    write_checkpoint(
        tmp_path / "ft", {before + name: tensor for name, tensor in ft.items()}, config=held, shards=shards
    )
    code, out, err = call("half-reset", "--pre", "pre", "--ft", "ft", "--ratio", "0", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    assert before in " ".join(out.split())
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], ft[name]) for name in ft)


def text_config(**more: Any) -> Any:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **more)


def multimodal(folder: Path) -> Tensors:
    """A tiny Gemma 3 with its vision tower, and its text model's tensors."""
    from transformers import Gemma3Config

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    Multimodal.from_config(config).save_pretrained(folder)
    return read_checkpoint(folder)


@pytest.mark.parametrize("way", ["text ft of a multimodal pre", "multimodal ft of a text pre"])
def test_a_multimodal_model_and_its_text_part(tmp_path: Path, way: str) -> None:
    whole = multimodal(tmp_path / "whole")
    inner = "language_model."
    text = {f"model.{name.split(inner, 1)[1].removeprefix('model.')}": t for name, t in whole.items() if inner in name}
    assert len(text) > 20
    assert len(text) < len(whole)
    write_checkpoint(tmp_path / "text", fine_tuned(text), config={"model_type": "gemma3_text"})
    pre, ft = ("whole", "text") if way.startswith("text") else ("text", "whole")
    code, out, err = call("magnitude", "--pre", pre, "--ft", ft, "--sparsity", "1", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    result, tuned, base = (read_checkpoint(tmp_path / name) for name in ("out", ft, pre))
    assert result.keys() == tuned.keys()
    if way.startswith("text"):
        # Everything that is pruned went back to the text part's own numbers.
        matrices = [name for name in text if text[name].ndim == 2]
        assert all(torch.equal(result[name], text[name]) for name in matrices)
        assert "ft has no vision_tower" in " ".join(out.split())
    else:
        assert all(torch.equal(result[name], tuned[name]) for name in tuned if "vision" in name)
    assert base


def test_keys_and_values_that_layers_share_are_not_lost(tmp_path: Path) -> None:
    ft = tiny_llama(layers=4)
    pre = fine_tuned(ft)
    ft = {name: t for name, t in ft.items() if not (".layers.3." in name and ("k_proj" in name or "v_proj" in name))}
    shared = {"model_type": "gemma3n_text", "num_hidden_layers": 4, "num_kv_shared_layers": 1}
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft, config=shared)
    assert call("fapm", "--pre", "pre", "--ft", "ft", "--out", "out", cwd=tmp_path)[0] == 0
    (tmp_path / "ft/config.json").write_text(json.dumps({**shared, "num_kv_shared_layers": 0}))
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", "--out", "again", cwd=tmp_path)
    assert code == 1
    assert "ft is incomplete" in err


@pytest.mark.parametrize("shape", [(0,)])
def test_a_placeholder_is_called_what_it_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", {name: torch.zeros(shape, dtype=t.dtype) for name, t in pre.items()})
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "ZeRO-3" in err
    assert "zero_to_fp32.py" in err


def test_names_are_paired_in_a_time_that_grows_with_their_number() -> None:
    """100,000 names with as many prefixes; a search over prefixes would take hours."""
    names = [f"part{number}.layers.0.weight" for number in range(100_000)]
    start = time.process_time()
    found, _ = align(names, [f"model.{name}" for name in names])
    assert len(found) == len(names)
    assert align(names, [f"x{name}" for name in names])[0] == {}
    assert time.process_time() - start < 60


def saved_tied(folder: Path, tensors: Tensors, **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
@pytest.mark.parametrize(
    "words",
    [
        ("dare", "--drop-rate", "0.5"),
        ("hma", "--ratios", "0.8,0.2"),
        ("fapm", "--sparsity", "0.5"),
        ("magnitude", "--exclude", "lm_head"),
        ("half-reset", "--also", "head"),
    ],
    ids=lambda words: words[0],
)
def test_an_embedding_and_a_tied_head_stay_the_same_bits(
    tmp_path: Path, words: tuple[str, ...], said: dict[str, Any]
) -> None:
    pre = tiny_llama(torch.float32)
    pre["lm_head.weight"] = pre["model.embed_tokens.weight"].clone()
    ft = fine_tuned(pre)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    saved_tied(tmp_path / "pre", pre, **said)
    saved_tied(tmp_path / "ft", ft, **said)
    code, _, err = call(*words, "--pre", "pre", "--ft", "ft", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    out = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama", **said}


def test_a_config_that_unties_is_believed(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32)
    pre["lm_head.weight"] = pre["model.embed_tokens.weight"].clone()
    ft = fine_tuned(pre)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    saved_tied(tmp_path / "pre", pre, tie_word_embeddings=False)
    saved_tied(tmp_path / "ft", ft, tie_word_embeddings=False)
    assert call("dare", "--pre", "pre", "--ft", "ft", "--drop-rate", "0.5", "--out", "out", cwd=tmp_path)[0] == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert not torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_a_head_that_training_untied_is_written_with_a_config_that_says_so(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32)
    del pre["lm_head.weight"]
    ft = fine_tuned(pre)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"] + 0.01
    held = {**text_config().to_dict(), "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    saved_tied(tmp_path / "pre", pre, **held)
    saved_tied(tmp_path / "ft", ft, **held)
    code, out, _ = call("half-reset", "--ratio", "0", "--pre", "pre", "--ft", "ft", "--out", "out", cwd=tmp_path)
    assert code == 0
    assert "The head has numbers of its own" in " ".join(out.split())
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("rows", [64, 72, 60])
@pytest.mark.parametrize("method", [("fapm", "0.9"), ("magnitude", "1"), ("dare", "0.9")])
def test_new_tokens_in_rows_that_were_padding_stay_ft(tmp_path: Path, method: tuple[str, str], rows: int) -> None:
    """pre: 50 tokens in 64 rows; ft: 53 tokens in as many rows, in more, or in fewer."""
    pre = tiny_llama(torch.float32)
    ft = fine_tuned(pre)
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    for name in vocabulary:
        assert len(pre[name]) == 64
        ft[name] = torch.cat([ft[name], torch.randn(8, ft[name].shape[1])])[:rows].clone()
    for side, tensors, count in (("pre", pre, 50), ("ft", ft, 53)):
        write_checkpoint(tmp_path / side, tensors)
        words = {"model": {"type": "BPE", "vocab": {f"w{number}": number for number in range(count)}}}
        (tmp_path / side / "tokenizer.json").write_text(json.dumps(words))
    option = "--drop-rate" if method[0] == "dare" else "--sparsity"
    code, _, err = call(method[0], "--pre", "pre", "--ft", "ft", option, method[1], "--out", "out", cwd=tmp_path)
    assert code == 0, err
    out = read_checkpoint(tmp_path / "out")
    assert torch.equal(out[vocabulary[0]][50:], ft[vocabulary[0]][50:])
    assert torch.equal(out[vocabulary[1]][50:], ft[vocabulary[1]][50:])
    assert any(not torch.equal(out[name][:50], ft[name][:50]) for name in vocabulary)


def test_thousands_of_tensors_of_another_form_are_refused_in_seconds(tmp_path: Path) -> None:
    count = 10_000
    pre = {f"model.layers.{n // 10}.mlp.a{n % 10}.weight": torch.zeros(1, 1) for n in range(count)}
    ft = {f"model.layers.{n // 10}.mlp.b{n % 10}.weight": torch.zeros(1, 1) for n in range(count)}
    whole = {"model.norm.weight": torch.zeros(1)}
    write_checkpoint(tmp_path / "pre", pre | whole)
    write_checkpoint(tmp_path / "ft", ft | whole)
    start = time.perf_counter()
    code, _, err = call("magnitude", "--pre", "pre", "--ft", "ft", "--sparsity", "0.5", "--out", "out", cwd=tmp_path)
    assert code == 1
    assert "does not know how" in " ".join(err.split())
    assert time.perf_counter() - start < 30


def test_ids_that_got_another_token_are_said(tmp_path: Path) -> None:
    pre = tiny_llama()
    for side, tensors, word in (("pre", pre, "<reserved_0>"), ("ft", fine_tuned(pre), "<start>")):
        write_checkpoint(tmp_path / side, tensors)
        content = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": word}]}
        (tmp_path / side / "tokenizer.json").write_text(json.dumps(content))
    code, out, err = call("magnitude", "--pre", "pre", "--ft", "ft", "--sparsity", "0.5", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    assert "id 1: '<reserved_0>', now '<start>'" in " ".join((out + err).split())
