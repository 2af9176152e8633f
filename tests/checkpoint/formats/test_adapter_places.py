"""Where an adapter lies and in what form: given as a file, deep in a folder, beside others, inside a state dict."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import Made, assert_same, load, make, reload
from helpers.families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from surgery.__main__ import main
from surgery.checkpoint.source import Checkpoint, open_both
from surgery.errors import CheckpointError


def assert_read(made: Made, typed: Path | str) -> Checkpoint:
    """What is typed gives peft's merge."""
    checkpoint = open_both(str(made.base), str(typed))[1][0]
    assert checkpoint.tensors.keys() == made.merged.keys()
    for name, tensor in checkpoint.tensors.items():
        assert_same(load(tensor), made.merged[name], name)
    return checkpoint


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_may_be_given_as_its_file(tmp_path: Path, safe: bool) -> None:
    made = make(tmp_path, FAMILIES["llama"], safe=safe, target_modules=["q_proj"])
    file = made.adapter / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    assert_read(made, file)
    (made.adapter / "adapter_config.json").unlink()
    for typed in (file, made.adapter):
        with pytest.raises(
            CheckpointError, match=r"without adapter_config\.json, which says how the adapter is scaled"
        ):
            assert_read(made, typed)


def test_an_adapter_is_found_in_a_folder_of_a_folder(tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj"])
    shutil.copytree(made.adapter, tmp_path / "run" / "checkpoint-500" / "adapter")
    found = assert_read(made, tmp_path / "run")
    assert any(note.endswith("lie in its folder checkpoint-500/adapter.") for note in found.notes)
    shutil.copytree(made.adapter, tmp_path / "run" / "checkpoint-900" / "adapter")
    with pytest.raises(CheckpointError, match=r"2 folders that do .* Give one, such as .*checkpoint-900/adapter"):
        assert_read(made, tmp_path / "run")


def test_the_tokenizer_beside_an_adapter_deep_in_a_folder_goes_to_the_output(tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj"])
    inner = tmp_path / "run" / "checkpoint-500" / "adapter"
    shutil.copytree(made.adapter, inner)
    (made.base / "tokenizer.json").write_text('{"of": "the base"}')
    (inner / "tokenizer.json").write_text('{"of": "the adapter"}')
    words = ["fapm", "--pre", made.base, "--ft", tmp_path / "run", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (inner / "tokenizer.json").read_bytes()
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_further_adapters_in_a_folder_are_named(tmp_path: Path) -> None:
    """peft saves the first in the folder itself and the others in folders of their names."""
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj"])
    model = PeftModel.from_pretrained(FAMILIES["llama"].build(1), str(made.adapter))
    model.add_adapter("poems", LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(str(tmp_path / "both"))
    found = assert_read(made, tmp_path / "both")
    assert any("further adapters (poems)" in note and "both/poems" in note for note in found.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]},
    ],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_lora_inside_a_state_dict_is_put_on_its_base(tmp_path: Path, options: dict[str, Any], prefix: str) -> None:
    """A checkpoint of the whole model in training, FSDP's for one, with the adapter's configuration beside it."""
    made = make(tmp_path, FAMILIES["llama"], **options)
    model = PeftModel.from_pretrained(reload(FAMILIES["llama"].build(1), made.base, None), str(made.adapter))
    state = {key.replace("base_model.model.", prefix, 1): value.clone() for key, value in model.state_dict().items()}
    shutil.copytree(made.base, tmp_path / "state")
    save_file(state, tmp_path / "state" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"merge_and_unload.*or put the adapter's adapter_config\.json"):
        assert_read(made, tmp_path / "state")
    shutil.copy(made.adapter / "adapter_config.json", tmp_path / "state")
    found = assert_read(made, tmp_path / "state")
    assert any("it was added as adapter_config.json says" in note for note in found.notes)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_both(str(tmp_path / "state"), str(made.base))


def test_another_base_than_the_one_named_is_said(tmp_path: Path) -> None:
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj"])
    assert not assert_read(made, made.adapter).notes
    shutil.copytree(made.base, tmp_path / "elsewhere" / "base")
    assert not open_both(str(tmp_path / "elsewhere" / "base"), str(made.adapter))[1][0].notes
    shutil.copytree(made.base, tmp_path / "another")
    (note,) = open_both(str(tmp_path / "another"), str(made.adapter))[1][0].notes
    assert note.endswith(
        f"names {made.base} as its base, and pre is {tmp_path / 'another'}: the two must be the same weights."
    )


@pytest.mark.parametrize("typed", ["adapter", "adapter/adapter_model.safetensors", "run"])
def test_an_adapter_is_no_base_in_any_form(tmp_path: Path, typed: str) -> None:
    made = make(tmp_path, FAMILIES["llama"], target_modules=["q_proj"])
    shutil.copytree(made.adapter, tmp_path / "run" / "checkpoint-7")
    with pytest.raises(CheckpointError, match=rf"is an adapter, so it cannot be `pre`.*made for, {made.base}\.$"):
        open_both(str(tmp_path / typed), str(made.base))


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_a_conversion_to_plain_lora_is_read_on_the_base(tmp_path: Path, begun: Any) -> None:
    """save_pretrained with path_initial_model_for_weight_conversion: twice the rank, and no change of the base."""
    model = FAMILIES["llama"].build(1)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=begun)
    trained = get_peft_model(reload(model, tmp_path / "base", None), config)
    trained.save_pretrained(str(tmp_path / "initial"))
    with torch.no_grad():
        for parameter in (p for p in trained.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    trained.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merged = trained.merge_and_unload().state_dict()
    found = open_both(str(tmp_path / "base"), str(tmp_path / "plain"))[1][0].tensors
    for name, tensor in merged.items():
        torch.testing.assert_close(load(found[name]), tensor, atol=1e-6, rtol=1e-5)
