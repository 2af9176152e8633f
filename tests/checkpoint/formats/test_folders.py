"""Folders as programs leave them: parts without an index, an index of an earlier cut, sub-folders, and what others must join."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import INDEX, Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call
from safetensors.torch import save_file


@pytest.fixture
def pre(tmp_path: Path) -> Tensors:
    tensors = tiny_llama()
    write_checkpoint(tmp_path / "pre", tensors)
    return tensors


def folder(tmp_path: Path, name: str = "ft") -> Path:
    made = tmp_path / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return made


def halves(tensors: Tensors) -> list[Tensors]:
    names = list(tensors)
    return [{name: tensors[name] for name in part} for part in (names[:9], names[9:])]


def kept(tmp_path: Path, ft: Tensors, says: str) -> None:
    """ft is read as one model: with nothing reset the output has its numbers."""
    code, out, err = call("half-reset", "--ratio", "0", "--pre", "pre", "--ft", "ft", "--out", "out", cwd=tmp_path)
    assert code == 0, err
    assert says in " ".join(out.split())
    result = read_checkpoint(tmp_path / "out")
    assert result.keys() == ft.keys()
    assert all(torch.equal(result[name], ft[name]) for name in ft)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("hf_model_{:04d}_0.pt", 2),
        ("model-{:05d}-of-00002.safetensors", 2),
        ("ft-model-{:05d}-of-00002.safetensors", 2),
    ],
)
@pytest.mark.parametrize("stale", [False, True])
def test_numbered_parts_are_one_model(tmp_path: Path, pre: Tensors, pattern: str, count: int, stale: bool) -> None:
    ft = fine_tuned(pre)
    made = folder(tmp_path)
    for number, part in enumerate(halves(ft), 1):
        path = made / pattern.format(number)
        torch.save(part, path) if path.suffix == ".pt" else save_file(part, path, {"format": "pt"})
    if stale and pattern.endswith(".safetensors"):
        earlier = dict.fromkeys(ft, "model-00001-of-00004.safetensors")
        (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": earlier}))
        kept(tmp_path, ft, "names files of an earlier cut")
    else:
        kept(tmp_path, ft, f"{count} numbered files were read as one model")
    if pattern.endswith(".safetensors"):
        assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].keys() == ft.keys()


def test_a_part_that_is_missing_is_named(tmp_path: Path, pre: Tensors) -> None:
    made = folder(tmp_path)
    for number, part in enumerate(halves(fine_tuned(pre)), 1):
        save_file(part, made / f"model-{number:05d}-of-00003.safetensors")
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "part 3 is missing" in err


def test_files_that_are_not_parts_of_one_model_are_refused(tmp_path: Path, pre: Tensors) -> None:
    made = folder(tmp_path)
    for name in ("good.safetensors", "better.safetensors"):
        save_file(pre, made / name)
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "do not look like parts of one model" in err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "hf", "checkpoint-500"])
def test_weights_in_a_sub_folder_are_found(tmp_path: Path, pre: Tensors, name: str) -> None:
    ft = fine_tuned(pre)
    inner = folder(tmp_path) / name
    inner.mkdir()
    parts = {f"pytorch_model-{number:05d}-of-00002.bin": part for number, part in enumerate(halves(ft), 1)}
    for file, part in parts.items():
        torch.save(part, inner / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    kept(tmp_path, ft, f"lie in its folder {name}")


def test_several_sub_folders_are_named(tmp_path: Path, pre: Tensors) -> None:
    made = folder(tmp_path)
    for step in (10, 20):
        write_checkpoint(made / f"checkpoint-{step}", pre)
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "checkpoint-10, checkpoint-20" in err
    assert "Give one, such as" in err


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["global_step10/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"], "zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt"], "DeepSpeed ZeRO"),
        (["global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed ZeRO"),
        (["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "verl.model_merger"),
        (["iter_0000100/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"], "Megatron"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], "accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
        (["consolidated.safetensors", "params.json"], "convert_mistral_weights_to_hf"),
        (["tf_model.h5"], "save_pretrained"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_others_must_join_is_refused_with_the_command(
    tmp_path: Path, pre: Tensors, files: list[str], says: str
) -> None:
    made = folder(tmp_path)
    for name in files:
        path = made / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"x")
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert says in err


@pytest.mark.parametrize("given", ["ft", "ft/last.ckpt"])
def test_lightnings_checkpoint_gets_the_names_that_transformers_loads(tmp_path: Path, pre: Tensors, given: str) -> None:
    ft = fine_tuned(pre)
    state = {"state_dict": {f"model.{name}": tensor for name, tensor in ft.items()}, "epoch": 1, "callbacks": {}}
    torch.save(state, folder(tmp_path) / "last.ckpt")
    code, out, err = call("half-reset", "--ratio", "0", "--pre", "pre", "--ft", given, "--out", "out", cwd=tmp_path)
    assert code == 0, err
    assert "model.model.embed_tokens.weight and its like are called model.embed_tokens.weight" in " ".join(out.split())
    result = read_checkpoint(tmp_path / "out")
    assert result.keys() == ft.keys()
    assert all(torch.equal(result[name], ft[name]) for name in ft)


def test_a_state_dict_under_the_name_of_torchs_tutorial_is_read(tmp_path: Path, pre: Tensors) -> None:
    ft = fine_tuned(pre)
    state = {"model_state_dict": ft, "optimizer_state_dict": {"state": {}, "param_groups": []}, "epoch": 3, "loss": 0.5}
    torch.save(state, folder(tmp_path) / "checkpoint.pt")
    kept(tmp_path, ft, "Wrote")


def test_a_note_of_git_lfs_is_told(tmp_path: Path, pre: Tensors) -> None:
    note = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"
    (folder(tmp_path) / "model.safetensors").write_text(note)
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "git lfs pull" in err


def test_an_adapter_whose_numbers_zero3_kept_is_told(tmp_path: Path, pre: Tensors) -> None:
    made = folder(tmp_path)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_{kind}.weight": torch.zeros(0) for kind in "AB"}, made / "adapter_model.safetensors")
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    code, _, err = call("fapm", "--pre", "pre", "--ft", "ft", cwd=tmp_path)
    assert code == 1
    assert "stage3_gather_16bit_weights_on_model_save" in err
