"""One block of weights at a time, each read once, within the memory that was promised; and what cannot be run, said clearly."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from helpers.hooks import NOT_TEXT, opened, sample_tokens, saved
from safetensors.torch import load_file, save_file

from surgery.calibrate.lockstep import measure
from surgery.checkpoint.checksum import fingerprint, weights_fingerprint
from surgery.checkpoint.tensor import Reader
from surgery.errors import CheckpointError, OptionError
from surgery.model.skeleton import activation_bytes
from surgery.model.weights import Weights


def test_every_weight_is_read_once_and_the_head_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path, "llama")
    read: dict[str, int] = defaultdict(int)
    fill = Reader.fill

    def counted(self: Reader, offset: int, view: memoryview) -> int:
        read[self.tensor.name] += len(view)
        return fill(self, offset, view)

    monkeypatch.setattr(Reader, "fill", counted)
    steps: list[tuple[int, int]] = []
    measure(checkpoint, tmp_path, sample_tokens(5), batch=2, advance=lambda done, total: steps.append((done, total)))
    assert read == {name: tensor.nbytes for name, tensor in checkpoint.tensors.items() if name != "lm_head.weight"}
    assert steps == [(done, 5) for done in range(1, 6)]  # the embedding, three layers, the norm


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "llama")

    def held() -> dict[int, int]:
        """Bytes of parameters by their address; what stands for one that is not loaded takes 4."""
        gc.collect()
        parameters = [other for other in gc.get_objects() if type(other) is torch.nn.Parameter and not other.is_meta]
        storages = [parameter.untyped_storage() for parameter in parameters]
        return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() > 4}

    before = held().keys()
    between: list[int] = []
    inside: list[int] = []
    load = Weights.load

    def watched(self: Weights, names: Any) -> dict[str, torch.Tensor]:
        between.append(len(held().keys() - before))
        loaded = load(self, names)
        inside.append(len(held().keys() - before))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "load", watched)
        measure(checkpoint, tmp_path, sample_tokens())
    assert between == [0] * 6
    assert inside == [0, 1, 9, 9, 9, 1]  # what stays for good, the embedding, three layers, the norm


def test_the_checksums_of_what_was_read_save_reading_it_again(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "mixtral")
    sums: dict[str, str] = {}
    measure(checkpoint, tmp_path, sample_tokens(), checksums=sums)
    assert checkpoint.tensors.keys() - sums.keys() == {"lm_head.weight"}
    assert weights_fingerprint(checkpoint, sums) == weights_fingerprint(checkpoint)
    assert weights_fingerprint(checkpoint, {"lm_head.weight": "0" * 32}) != weights_fingerprint(checkpoint)
    other = saved(tmp_path / "other", "mixtral", seed=1)
    assert weights_fingerprint(other) != weights_fingerprint(checkpoint)
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model_type": "notamodel"}, "cannot read it"),
        ({"architectures": ["NoSuchModel"], "model_type": "vit"}, "takes pixel_values, not text"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3"),
        ({"num_attention_heads": 5}, "hidden size .* is not a multiple"),
        ({"rms_norm_eps": "small"}, "cannot read it|cannot build|cannot run"),
    ],
)
def test_a_configuration_that_does_not_fit_is_explained(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    checkpoint = saved(tmp_path, "llama")
    change_config(tmp_path, **values)
    with pytest.raises((CheckpointError, OptionError), match=complaint) as caught:
        measure(checkpoint, tmp_path, sample_tokens())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("lost", ["experts.2.w1.weight", "experts.3.w2.weight"])
def test_an_expert_that_is_not_there_is_noticed_from_the_headers(tmp_path: Path, lost: str) -> None:
    saved(tmp_path, "mixtral")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith(lost) and ".layers.2." in name]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    checksums: dict[str, str] = {}
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\..*complete"):
        measure(opened(tmp_path), tmp_path, sample_tokens(), checksums=checksums)
    assert not checksums


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "llama")
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass C: ...\n"
    (tmp_path / "evil.py").write_text(code)
    change_config(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    with pytest.raises(CheckpointError, match="code that comes with a model is not run"):
        measure(checkpoint, tmp_path, sample_tokens())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", NOT_TEXT)
def test_a_model_that_takes_no_text_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not text"):
        measure(saved(tmp_path, family), tmp_path, sample_tokens())


def test_numbers_that_are_not_finite_are_traced_to_the_layer(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: its input holds NaN"):
        measure(opened(tmp_path), tmp_path, sample_tokens())


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="gives token 99, and the model has only 99"):
        measure(saved(tmp_path, "llama"), tmp_path, torch.tensor([[1, 99]]))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "llama")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        measure(checkpoint, tmp_path, sample_tokens())


def test_a_weight_that_is_used_outside_its_module_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def peeking(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.layers[1].mlp.up_proj.weight.shape == (48, 32)  # to look is allowed
        self.layers[1].mlp.up_proj.weight.T @ torch.ones(48)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", peeking)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: the model uses it outside"):
        measure(saved(tmp_path, "llama"), tmp_path, sample_tokens())


def test_memory_grows_neither_with_the_layers_nor_with_the_maximum_context(tmp_path: Path) -> None:
    def run(layers: int, positions: int) -> dict[str, int]:
        script = Path(__file__).parents[1] / "helpers/calibration_memory.py"
        folder = tmp_path / f"{layers}"
        sizes = [str(size) for size in (layers, 1024, 4, 128, positions)]
        done = subprocess.run([sys.executable, script, folder, *sizes], capture_output=True, text=True, check=True)
        shutil.rmtree(folder)
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    small, large = run(2, 4096), run(20, 1_000_000)
    layer = (large["file"] - small["file"]) / 18
    assert layer > 25e6
    growth = (large["peak"] - large["before"]) - (small["peak"] - small["before"])
    assert growth < layer / 2
    assert large["peak"] - large["before"] < 4 * layer


@pytest.mark.parametrize(("family", "kinds"), [("t5", 3), ("gemma2", 2), ("gpt_oss", 2), ("bert", 0), ("llama", 0)])
def test_passes_share_their_masks(family: str, kinds: int, tmp_path: Path) -> None:
    """Of T × T tensors there is one of a kind, not one for each pass; T = 23 is the size of nothing else."""
    seen = set()

    def look(done: int, total: int) -> None:
        gc.collect()
        square = [other for other in gc.get_objects() if type(other) is torch.Tensor and other.shape[-2:] == (23, 23)]
        seen.add(len({tensor.data_ptr() for tensor in square}))

    length = 46 if family == "t5" else 23
    norms = measure(saved(tmp_path, family), tmp_path, sample_tokens(6, length), advance=look)
    assert norms
    assert max(seen) <= kinds


def test_the_bound_on_activations_holds(tmp_path: Path) -> None:
    """What the passes hold between two blocks, counted."""
    checkpoint = saved(tmp_path, "llama")
    samples, length = 5, 37
    held = []

    def look(done: int, total: int) -> None:
        gc.collect()
        tensors = [other for other in gc.get_objects() if type(other) is torch.Tensor and length in other.shape]
        held.append(
            sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
        )

    measure(checkpoint, tmp_path, sample_tokens(samples, length), advance=look)
    config = FAMILIES["llama"].build().config
    bound = activation_bytes(config, samples, length, torch.float32)
    assert bound / 2 < max(held) <= bound
    assert held[1] == held[2]  # whatever the layer
    assert bound == samples * activation_bytes(config, 1, length, torch.float32)
