"""Pairs and outputs that are not one to one: a vocabulary that grew, experts as groups, files cut anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    INDEX,
    Tensors,
    fine_tuned,
    read_checkpoint,
    tiny_llama,
    tiny_llama_pair,
    write_checkpoint,
)
from helpers.reference.formulas import same_bits
from helpers.runs import MAKE, edit
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from surgery.__main__ import main
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods.fapm import Fapm
from surgery.methods.magnitude import Magnitude

EMBEDDING = "model.embed_tokens.weight"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


def grown(tensors: Tensors, rows: int) -> Tensors:
    """With so many rows of ones behind the embedding."""
    more = torch.ones(rows, 16, dtype=tensors[EMBEDDING].dtype)
    return tensors | {EMBEDDING: torch.cat([tensors[EMBEDDING], more])}


@pytest.mark.parametrize("name", ["fapm", "magnitude", "half-reset", "hma"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_shared_rows_are_edited_as_if_they_were_all_and_the_new_ones_are_fts(
    name: str, rows: int, tmp_path: Path
) -> None:
    pre, ft = tiny_llama(), fine_tuned(tiny_llama())
    options: dict[str, Any] = {"also": ("embedding",)} if name == "half-reset" else {}
    plain = edit(tmp_path / "plain", pre, ft, MAKE[name](**options))
    more = edit(tmp_path / "more", pre, grown(ft, rows), MAKE[name](**options))
    assert same_bits(more[EMBEDDING], grown(plain, rows)[EMBEDDING])
    assert all(same_bits(more[key], plain[key]) for key in plain if key != EMBEDDING)
    padded = edit(tmp_path / "padded", grown(pre, rows), ft, MAKE[name](**options))
    assert all(same_bits(padded[key], plain[key]) for key in plain)


def test_the_report_counts_the_new_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "pre", tiny_llama())
    write_checkpoint(tmp_path / "ft", grown(fine_tuned(tiny_llama()), 7))
    words = ["fapm", "--pre", str(tmp_path / "pre"), "--ft", str(tmp_path / "ft"), "--out", str(tmp_path / "out")]
    assert main([*words, "--strict"]) == 1
    assert f"{EMBEDDING} has 64 rows on both sides and 7 more in ft" in capsys.readouterr().err
    assert main(words) == 0
    report = json.loads((tmp_path / "out/surgery-report.json").read_text())
    line = next(line for line in report["tensors"] if line["name"] == EMBEDDING)
    assert line["new_rows"] == 7
    assert line["kept"] + line["pruned"] == line["entries"] == 71 * 16
    assert any("7 more in ft: kept as they are" in note for note in report["notes"])


def unstacked(tensors: Tensors) -> Tensors:
    """Each expert stored by itself."""
    return {
        key: tensor
        for name, whole in tensors.items()
        for key, tensor in (
            {f"model.layers.0.mlp.experts.{e}.w1.weight": part.clone() for e, part in enumerate(whole)}
            if name == STACKED
            else {name: whole}
        ).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [Fapm, Magnitude])
def test_a_group_of_an_expert_is_what_the_expert_by_itself_would_get(
    method: type[Fapm | Magnitude], dtype: torch.dtype, tmp_path: Path
) -> None:
    pre = tiny_llama(dtype)
    # Experts of very different sizes: one threshold for all would prune some wholly.
    pre[STACKED] = (torch.randn(4, 6, 16) * torch.tensor([0.01, 0.1, 1, 10]).view(4, 1, 1)).to(dtype)
    ft = fine_tuned(pre)
    ft[STACKED] = (pre[STACKED].float() * (1 + 0.1 * torch.randn(4, 6, 16))).to(dtype)
    alone = edit(tmp_path / "alone", unstacked(pre), unstacked(ft), method(0.6))
    experts = edit(tmp_path / "experts", pre, ft, method(0.6, group="expert"))
    whole = edit(tmp_path / "whole", pre, ft, method(0.6))
    assert all(same_bits(tensor, alone[name]) for name, tensor in unstacked(experts).items())
    assert not same_bits(whole[STACKED], experts[STACKED])
    assert all(same_bits(whole[name], experts[name]) for name in whole if name != STACKED)


def test_files_are_cut_as_the_hubs_own_function_cuts_them(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, shards=2, width=64)
    run(prepare(tmp_path / "pre", tmp_path / "ft", Fapm(), out=tmp_path / "plain"))
    run(prepare(tmp_path / "pre", tmp_path / "ft", Fapm(), out=tmp_path / "cut", max_shard_size="100KB"))
    made, plain = read_checkpoint(tmp_path / "cut"), read_checkpoint(tmp_path / "plain")
    assert all(same_bits(made[name], plain[name]) for name in plain)
    ordered: Tensors = {}
    for path in sorted((tmp_path / "ft").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            ordered |= {name: made[name] for name in file.offset_keys()}
    expected = split_torch_state_dict_into_shards(ordered, max_shard_size="100KB")
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert index == {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    assert len(expected.filename_to_tensors) > 2
    for file_name, names in expected.filename_to_tensors.items():
        assert load_file(tmp_path / "cut" / file_name).keys() == set(names)
    from transformers import AutoModelForCausalLM

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}
    config |= {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.bfloat16).state_dict()
    assert all(same_bits(loaded[name], plain[name]) for name in plain)


def test_one_file_when_all_fits(tmp_path: Path) -> None:
    tiny_llama_pair(tmp_path, shards=2)
    run(prepare(tmp_path / "pre", tmp_path / "ft", Fapm(), out=tmp_path / "out", max_shard_size="5GB"))
    assert [path.name for path in (tmp_path / "out").glob("*safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("size", ["", "5", "0GB", "-1GB", "5 GB", "5XB", "GB"])
def test_a_size_that_is_none(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pre, ft = tiny_llama_pair(tmp_path)
    assert main(["fapm", "--pre", str(pre), "--ft", str(ft), "--max-shard-size", size]) == 1
    assert "--max-shard-size takes a size such as 5GB" in capsys.readouterr().err
