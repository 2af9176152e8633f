"""LoRA adapters that peft wrote, against what peft's own merge_and_unload makes of them: tensor by tensor, bit by bit."""

from __future__ import annotations

import json
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapters import Made, assert_is_merged, assert_same, blas_is_fused, fill, load, make
from helpers.checkpoints import Tensors, read_checkpoint, tiny_llama, write_checkpoint
from helpers.families import FAMILIES, Family
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from surgery.__main__ import main
from surgery.checkpoint.formats.adapter import read
from surgery.checkpoint.formats.format import Base
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.source import open_both
from surgery.checkpoint.tensor import Tensor
from surgery.errors import CheckpointError

UNTIED_GPT2 = Family("GPT2Config", {**FAMILIES["gpt2"].kwargs, "tie_word_embeddings": False})
BIG = Family("LlamaConfig", {**FAMILIES["llama"].kwargs, "num_hidden_layers": 1, "vocab_size": 1009, "hidden_size": 48})


FEATURES: dict[str, tuple[Family, dict[str, Any]]] = {
    "plain": (FAMILIES["llama"], {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (FAMILIES["llama"], {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "rank-stabilized": (FAMILIES["llama"], {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 6}),
    "patterns": (
        FAMILIES["llama"],
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            # The first that matches decides, in the order of the file, which peft sorts.
            "rank_pattern": {r"^model\.layers\.1\.mlp\.up_proj": 8, r"layers\.[12]\..*": 3, "v_proj": 2},
            "alpha_pattern": {"attn.q_proj": 100, r"layers\.2\.self_attn\.q_proj": 1.5, "q_pro": 100},
        },
    ),
    "rank of 40": (FAMILIES["llama"], {"target_modules": ["q_proj"], "r": 40}),
    "some layers": (FAMILIES["llama"], {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "conv1d": (FAMILIES["gpt2"], {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "square conv1d": (FAMILIES["gpt2"], {"target_modules": ["attn.c_proj"]}),
    "square conv1d and a linear head": (UNTIED_GPT2, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "embedding and head": (FAMILIES["llama"], {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding of gpt2": (UNTIED_GPT2, {"target_modules": ["wte", "c_fc"]}),
    "whole modules": (
        FAMILIES["llama"],
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "tied whole modules": (
        FAMILIES["qwen2"],
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "classifier": (
        FAMILIES["bert_classifier"],
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "exclude_modules": [".*pooler.*"]},
    ),
    "biases": (FAMILIES["qwen2"], {"target_modules": ["q_proj"], "bias": "all"}),
    "attention of a mixture": (FAMILIES["mixtral"], {"target_modules": ["q_proj", "o_proj"]}),
    "encoder and decoder": (FAMILIES["t5"], {"target_modules": ["q", "v", "wo"]}),
    "taken away": (FAMILIES["llama"], {"target_modules": ["q_proj"], "lora_alpha": -3}),
    "gaussian beginning": (FAMILIES["llama"], {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal beginning": (FAMILIES["llama"], {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_tensor_is_what_peft_merges(feature: str, tmp_path: Path) -> None:
    family, options = FEATURES[feature]
    assert_is_merged(make(tmp_path, family, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", ["all-linear", "conv1d", "embedding and head", "whole modules"])
def test_a_base_of_16_bits_is_rounded_as_peft_rounds_it(feature: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, options = FEATURES[feature]
    assert_is_merged(make(tmp_path, family, dtype=dtype, **options))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_an_adapter_may_be_of_another_type_than_its_base(
    dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    }
    assert_is_merged(make(tmp_path, FAMILIES["llama"], dtype=dtype, stored=stored, **options))


def test_torchs_own_file_is_read_too(tmp_path: Path) -> None:
    family, options = FEATURES["whole modules"]
    made = make(tmp_path, family, safe=False, **options)
    assert (made.adapter / "adapter_model.bin").exists()
    assert_is_merged(made)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_larger_vocabulary_comes_from_the_adapter(family: str, tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES[family], rows=120, target_modules=["q_proj"])
    ours = made.ours
    assert ours["model.embed_tokens.weight"].shape == (120, 32)
    for name, tensor in ours.items():
        assert_same(load(tensor), made.merged[name], name)


@pytest.mark.parametrize(("target", "other"), [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")])
def test_a_vocabulary_that_grew_on_one_side_alone_is_refused(
    target: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """peft saves the new rows of what is targeted, and not those of the other."""
    said = refused(make(tmp_path, FAMILIES["llama"], rows=120, target_modules=[target]), capsys)
    assert f"{target}.weight with 120 rows" in said
    assert f"{other}.weight has the base's 99. Save the adapter with save_embedding_layers=True" in said


def test_the_names_of_a_base_may_lack_a_prefix_or_have_one_more(tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj", "down_proj"])
    AutoModel.from_pretrained(made.base).save_pretrained(tmp_path / "headless")
    headless = replace(made, base=tmp_path / "headless").ours
    assert "layers.0.self_attn.q_proj.weight" in headless
    assert "lm_head.weight" not in headless
    for name, tensor in headless.items():
        assert_same(load(tensor), made.merged[f"model.{name}"], name)
    bare = make(tmp_path / "bare", FAMILIES["llama_base"], target_modules=["q_proj", "down_proj"])
    on_top = replace(bare, base=made.base).ours
    assert_same(load(on_top["lm_head.weight"]), made.merged["lm_head.weight"], "lm_head.weight")
    for name, merged in bare.merged.items():
        assert_same(load(on_top[f"model.{name}"]), merged, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_part_of_a_tensor_has_the_bytes_of_the_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["embed_tokens", "down_proj"], "modules_to_save": ["lm_head"]}
    made = make(tmp_path, BIG, dtype=dtype, stored=torch.float16, r=5, **options)
    assert_is_merged(made)
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        tensor = made.ours[name]
        whole = fill(tensor)
        with tensor.open() as reader:
            for _ in range(200):
                begin, end = sorted(rng.integers(0, tensor.nbytes + 1, 2).tolist())
                if rng.random() < 0.5:
                    end = min(end, begin + int(rng.integers(1, 600)))
                part = bytearray(end - begin)
                reader.fill(begin, memoryview(part))
                assert bytes(part) == whole[begin:end], (name, begin, end)
        rows = tensor.rows(7, 12)
        assert fill(rows) == whole[rows.start : rows.start + rows.nbytes]


def test_several_threads_read_the_same(tmp_path: Path) -> None:
    tensor = make(tmp_path, BIG, target_modules=["lm_head"]).ours["lm_head.weight"]
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fill(tensor))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert set(found) == {fill(tensor)}


@pytest.mark.parametrize("dora", [False, True])
def test_a_wide_layer_is_read_in_little_memory(tmp_path: Path, dora: bool) -> None:
    side, rank = 2048, 16
    factors = {"q.lora_A.weight": torch.randn(rank, side), "q.lora_B.weight": torch.randn(side, rank)}
    factors |= {"q.lora_magnitude_vector": torch.ones(side)} if dora else {}
    made = write_by_hand(tmp_path, {"q.weight": torch.randn(side, side)}, factors, use_dora=dora)
    view = memoryview(bytearray(1 << 20))
    tracemalloc.start()
    with made["q.weight"].open() as reader:
        for offset in range(0, 1 << 24, 1 << 20):
            reader.fill(offset, view)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def write_by_hand(folder: Path, base: Tensors, adapter: Tensors, **settings: Any) -> Mapping[str, Tensor]:
    folder.mkdir(exist_ok=True)
    save_file(base, folder / "model.safetensors")
    save_file(adapter, folder / "adapter_model.safetensors")
    rank = adapter["q.lora_A.weight"].shape[0]
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return read(
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
        Base(read_header(folder / "model.safetensors").tensors, {}),
    )


def test_the_base_may_be_a_part_of_a_larger_tensor(tmp_path: Path) -> None:
    factors = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(3, 2)}
    both = torch.arange(24.0).reshape(6, 4)
    made = write_by_hand(tmp_path, {"q.weight": both[3:].clone(), "both.weight": both}, factors)
    header = read_header(tmp_path / "model.safetensors").tensors
    part = replace(header["both.weight"].rows(3, 6), name="q.weight")
    again = read(tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors", Base({"q.weight": part}, {}))
    assert torch.equal(load(again["q.weight"]), both[3:] + 4)
    assert fill(again["q.weight"]) == fill(made["q.weight"])


def test_an_entry_is_summed_by_fused_steps_in_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=generator), torch.randn(9, 7, generator=generator)
    made = write_by_hand(tmp_path, {"q.weight": torch.zeros(9, 5)}, {"q.lora_A.weight": a, "q.lora_B.weight": b})
    ours = load(made["q.weight"])
    for row in range(9):
        for column in range(5):
            total = Fraction(0)
            for k in range(7):
                exact = total + Fraction(b[row, k].item()) * Fraction(a[k, column].item())
                total = Fraction(float(np.float32(float(exact))))
            assert ours[row, column].item() == float(total) * 2


def test_an_edit_of_an_adapter_is_that_of_the_merged_model(tmp_path: Path) -> None:
    family, options = FEATURES["all-linear"]
    made = make(tmp_path, family, dtype=torch.bfloat16, **options)
    (made.base / "tokenizer.json").write_text("{}")
    for method in (["fapm"], ["hma", "--ratios", "0.3,0.2,0.1"], ["half-reset"]):
        outs = []
        for side in ("adapter", "merged"):
            out = tmp_path / f"{method[0]}-{side}"
            command = [*method, "--pre", str(made.base), "--ft", str(tmp_path / side), "--out", str(out)]
            assert main(command) == 0
            outs.append(out)
        first, second = outs
        assert (first / "config.json").read_bytes() == (made.base / "config.json").read_bytes()
        assert (first / "tokenizer.json").exists()
        assert not list(first.glob("adapter*"))
        if blas_is_fused():
            assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        type(family.build()).from_pretrained(first)


def spoil(made: Made, **settings: Any) -> None:
    path = made.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def spoil_tensors(made: Made, change: Callable[[Tensors], Tensors]) -> None:
    path = made.adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def refused(made: Made, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence or two that the command line prints."""
    out = made.folder / "out"
    assert main(["fapm", "--pre", str(made.base), "--ft", str(made.adapter), "--out", str(out)]) == 1
    assert not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "OFT"}, "is an adapter of type OFT, which surgery does not read. Merge it"),
    "a prompt": ({"peft_type": "PREFIX_TUNING"}, "is an adapter of type PREFIX_TUNING, which changes no weight"),
    "no method": ({"peft_type": None}, "is an adapter of type None"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq, which changes the base too"),
    "an odd beginning": ({"init_lora_weights": ["x"]}, "changes the base too"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
    "layers": ({"layer_replication": [[0, 2], [1, 3]]}, "sets layer_replication"),
    "another rank": ({"r": 5}, "A of rank 4 and B of rank 4, where adapter_config.json says 5"),
    "no rank": ({"r": None}, "r is missing or damaged"),
    "a rank of zero": ({"r": 0}, "r is missing or damaged"),
    "half a rank": ({"r": 4.5}, "r is missing or damaged"),
    "an endless alpha": ({"lora_alpha": float("inf")}, "lora_alpha is missing or damaged"),
    "an alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha is missing or damaged"),
    "a false alpha": ({"lora_alpha": True}, "lora_alpha is missing or damaged"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern is missing or damaged"),
    "a broken pattern": ({"alpha_pattern": {"q_(proj": 3}}, "alpha_pattern is missing or damaged"),
    "a name for a list": ({"modules_to_save": "lm_head"}, "modules_to_save is missing or damaged"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_beyond_lora_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, message = SETTINGS[case]
    made = by_hand(tmp_path)
    spoil(made, **settings)
    said = refused(made, capsys)
    assert message in said
    assert "adapter_config.json" in said


def by_hand(folder: Path) -> Made:
    """An adapter as peft writes it, without the time that peft takes."""
    base = write_checkpoint(folder / "base", tiny_llama(torch.float32))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = {f"{prefix}.lora_A.weight": torch.ones(4, 16), f"{prefix}.lora_B.weight": torch.ones(16, 4)}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return Made(base, folder / "adapter", {}, folder)


def test_what_the_refusals_start_from_is_accepted(tmp_path: Path) -> None:
    made = by_hand(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(load(made.ours[name]), read_checkpoint(made.base)[name] + 8)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
STORED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nothing": (lambda t: {}, "holds no tensor"),
    "no B": (lambda t: {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"]}, "has no pair of A and B"),
    "other ranks": (lambda t: {**t, f"{Q}.lora_B.weight": torch.ones(16, 3)}, "A of rank 4 and B of rank 3"),
    "other sizes": (lambda t: {**t, f"{Q}.lora_B.weight": torch.ones(17, 4)}, "where the base has [16, 16]"),
    "a convolution": (lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 16, 1, 1)}, "is no linear layer"),
    "integers": (lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}, "is no linear layer"),
    "a magnitude": (lambda t: {**t, f"{Q}.lora_magnitude_vector": torch.ones(16)}, "is no part of plain LoRA"),
    "an unknown module": (lambda t: {**t, "base_model.model.score.weight": torch.ones(2, 16)}, "changes score.weight"),
    "an unknown layer": (
        lambda t: {key.replace("layers.0", "layers.9"): value for key, value in t.items()},
        "changes model.layers.9.self_attn.q_proj.weight",
    ),
    "a whole tensor of another shape": (
        lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(17)},
        "has shape [17]",
    ),
    "a whole tensor of integers": (
        lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(16, dtype=torch.int32)},
        "is I32, where the base has F32",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_tensors_beyond_lora_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = STORED[case]
    made = by_hand(tmp_path)
    spoil_tensors(made, change)
    said = refused(made, capsys)
    assert message in said
    assert "adapter_model.safetensors" in said


def test_a_truncated_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = by_hand(tmp_path)
    path = made.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated" in refused(made, capsys)


def test_a_quantized_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = by_hand(tmp_path)
    path = made.base / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**load_file(path), name: torch.ones(16, 16, dtype=torch.int8)}, path)
    assert f"{name} is quantized" in refused(made, capsys)


def test_an_adapter_is_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = by_hand(tmp_path)
    assert "cannot be --pre" in refused(replace(made, base=made.adapter), capsys)


def test_with_a_vocabulary_that_grew_the_result_loads(tmp_path: Path) -> None:
    """The configuration comes from the base, with the new size."""
    made = make(tmp_path, FAMILIES["llama"], rows=107, modules_to_save=["embed_tokens", "lm_head"])
    assert main(["fapm", "--pre", str(made.base), "--ft", str(made.adapter), "--out", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.config.vocab_size == 107
    assert_same(model.lm_head.weight.data[99:], made.merged["lm_head.weight"][99:], "lm_head")
    assert main(["verify", str(tmp_path / "out"), "--pre", str(made.base), "--ft", str(made.adapter)]) == 0


@pytest.mark.parametrize("place", ["beside its base", "in a sub-folder", "in checkpoint-7"])
def test_an_adapter_is_found_where_people_leave_it(tmp_path: Path, place: str) -> None:
    """Beside the base's own weights, where transformers puts it on; in a folder of its own inside."""
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj", "up_proj"])
    ft = tmp_path / "ft"
    if place == "beside its base":
        shutil.copytree(made.base, ft)
        shutil.copytree(made.adapter, ft, dirs_exist_ok=True)
    else:
        shutil.copytree(made.adapter, ft / ("default" if place == "in a sub-folder" else "checkpoint-7"))
    pre, (tuned,) = open_both(str(made.base), str(ft))
    assert tuned.notes
    for name, tensor in tuned.tensors.items():
        expected = made.merged[name].flatten()
        assert torch.allclose(torch.frombuffer(bytearray(fill(tensor)), dtype=torch.float32), expected, atol=1e-6)
    assert all(fill(pre.tensors[name]) == fill(open_base(made.base)[name]) for name in pre.tensors)


def open_base(folder: Path) -> dict[str, Tensor]:
    return open_both(str(folder), str(folder))[0].tensors


def test_keys_may_name_the_adapter(tmp_path: Path) -> None:
    """As in a model's own state dict: lora_A.default.weight."""
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj", "up_proj"])
    plain = {name: fill(tensor) for name, tensor in made.ours.items()}
    path = made.adapter / "adapter_model.safetensors"
    named = {key.replace(".weight", ".default.weight"): value for key, value in load_file(path).items()}
    save_file(named, path)
    assert {name: fill(tensor) for name, tensor in made.ours.items()} == plain
    twice = named | {key.replace(".default.", ".other."): value.clone() for key, value in named.items()}
    save_file(twice, path)
    with pytest.raises(CheckpointError, match="several adapters"):
        _ = made.ours


@pytest.mark.parametrize("wrapped", ["base_model.model.", ""])
@pytest.mark.parametrize("base_layer", [True, False])
def test_a_lora_that_is_not_merged_is_refused(tmp_path: Path, wrapped: str, base_layer: bool) -> None:
    base = tiny_llama(torch.float32)
    write_checkpoint(tmp_path / "pre", base)
    state = {}
    for name, tensor in base.items():
        lora = "q_proj" in name
        key = name.replace(".weight", ".base_layer.weight") if lora and base_layer else name
        state[wrapped + key] = tensor
        if lora:
            module = name.removesuffix(".weight")
            state[f"{wrapped}{module}.lora_A.default.weight"] = torch.ones(2, tensor.shape[1])
            state[f"{wrapped}{module}.lora_B.default.weight"] = torch.ones(tensor.shape[0], 2)
    write_checkpoint(tmp_path / "ft", state)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_both(str(tmp_path / "pre"), str(tmp_path / "ft"))


@pytest.mark.parametrize("around", ["model.", "model.language_model."])
def test_a_lora_of_the_text_part_fits_a_multimodal_base(tmp_path: Path, around: str) -> None:
    text = tiny_llama(torch.float32)
    base = {name.replace("model.", around, 1): tensor for name, tensor in text.items()}
    base["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(6, 2)
    write_checkpoint(tmp_path / "pre", base)
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    (tmp_path / "lora").mkdir()
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    tensors = open_both(str(tmp_path / "pre"), str(tmp_path / "lora"))[1][0].tensors
    assert tensors.keys() == base.keys()
    stored = f"{around}layers.1.self_attn.q_proj.weight"
    found = torch.frombuffer(bytearray(fill(tensors[stored])), dtype=torch.float32).reshape(16, 16)
    assert torch.allclose(found, base[stored] + 3 * b @ a, atol=1e-5)
