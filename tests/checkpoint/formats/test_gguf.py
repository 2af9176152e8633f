"""GGUF files that the gguf package wrote, as llama.cpp's converter would, against what transformers loads from them."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint
from helpers.gguf_files import MODELS, Array, save, shake, stored_names, write_gguf
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from surgery.__main__ import main
from surgery.checkpoint.formats import Choice, choose
from surgery.checkpoint.formats.gguf import ARCHITECTURES, PIECE, Blocks, read
from surgery.checkpoint.tensor import Span, Tensor
from surgery.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def values(tensor: Tensor) -> torch.Tensor:
    """All entries, read at once."""
    held = bytearray(tensor.nbytes)
    with tensor.open() as reader:
        reader.fill(0, memoryview(held))
    return torch.frombuffer(held, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def loaded(path: Path, model: PreTrainedModel) -> Tensors:
    """What transformers makes of a GGUF file."""
    tensors: Tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]  # type: ignore[no-untyped-call]
    return tensors


@pytest.mark.parametrize("architecture", sorted(set(MODELS) - {"gemma"}))
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_every_tensor_is_what_transformers_loads(tmp_path: Path, architecture: str, kind: Type) -> None:
    model = MODELS[architecture].build(seed=1)
    shake(model)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, kind)
    other = stored_names(model)
    tensors = read(path, other)
    assert tensors.keys() == other.keys()
    expected = loaded(path, model)
    for name, tensor in tensors.items():
        assert tensor.shape == other[name].shape
        assert torch.equal(values(tensor), expected[name]), name


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1], ids=lambda kind: kind.name
)
def test_every_type_that_gguf_quantizes_to_is_what_transformers_loads(tmp_path: Path, kind: Type) -> None:
    model = MODELS["llama"].build(seed=1)
    path = write_gguf(tmp_path / "model.gguf", model, "llama", kind)
    expected = loaded(path, model)
    for name, tensor in read(path, stored_names(model)).items():
        assert tensor.dtype == (kind.name if kind in (Type.F16, Type.BF16) and len(tensor.shape) > 1 else "F32")
        assert torch.equal(values(tensor).float(), expected[name]), name


def test_unquantized_tensors_that_keep_their_order_are_bytes_of_the_file(tmp_path: Path) -> None:
    model = MODELS["llama"].build(seed=1)
    tensors = read(write_gguf(tmp_path / "model.gguf", model, "llama", Type.BF16), stored_names(model))
    kept = [name for name, tensor in tensors.items() if not isinstance(tensor.data, Span)]
    assert len(kept) == 3 * 4
    assert all(re.search(r"\.[qk]_proj\.(weight|bias)", name) for name in kept)


def test_gemma_1_which_transformers_does_not_read(tmp_path: Path) -> None:
    model = MODELS["gemma"].build(seed=1)
    shake(model)
    path = write_gguf(tmp_path / "model.gguf", model, "gemma")
    tensors = read(path, stored_names(model))
    for name, tensor in tensors.items():
        torch.testing.assert_close(values(tensor), model.state_dict()[name], rtol=0, atol=2e-7)
    assert tensors.keys() == stored_names(model).keys()


def test_every_architecture_is_tested() -> None:
    assert sorted(MODELS) == ARCHITECTURES


# All that the package dequantizes.
BLOCK_TYPES = [Type.F32, Type.F16, *gguf.quants._type_traits]


def random_codes(kind: Type, rows: int, columns: int) -> Array:
    """Random bytes of a quantized matrix, with scales that are finite, [rows, bytes]."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind)
    codes = generator.integers(0, 256, (rows, columns // block * size), np.uint8)
    blocks = codes.reshape(-1, size)
    with np.errstate(all="ignore"):
        blocks[~np.isfinite(gguf.dequantize(blocks, kind)).all(axis=-1)] = 0
    return codes


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_any_range_of_any_type_is_that_of_the_whole_tensor(tmp_path: Path, architecture: str) -> None:
    rows, columns, heads = 48, 768, 3
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_head_count(heads)
    leaf, name = (
        ("ffn_up", "transformer.h.{}.mlp.c_fc")
        if architecture == "gpt2"
        else ("attn_k", "model.layers.{}.self_attn.k_proj")
    )
    expected = []
    for layer, kind in enumerate(BLOCK_TYPES):
        codes = random_codes(kind, rows, columns)
        writer.add_tensor(f"blk.{layer}.{leaf}.weight", codes, raw_dtype=kind)
        whole = gguf.dequantize(codes, kind)
        if architecture == "llama":
            whole = whole.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        expected.append(whole.T if architecture == "gpt2" else whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = f"{name.format(0)}.weight"
    tensors = read(tmp_path / "model.gguf", {first: Tensor(first, "F32", (1,), Span(Path("other"), 0))})
    assert list(tensors) == [f"{name.format(layer)}.weight" for layer in range(len(BLOCK_TYPES))]
    generator = np.random.default_rng(0)
    for tensor, whole, kind in zip(tensors.values(), expected, BLOCK_TYPES, strict=True):
        assert tensor.shape == whole.shape
        assert np.array_equal(values(tensor).float().numpy(), whole), kind.name
        held = values(tensor).contiguous().view(torch.uint8).numpy().tobytes()
        with tensor.open() as reader:
            for begin, end in [(0, 1), (1, 4 * PIECE + 3), (len(held) - 1, len(held))] + [
                sorted(generator.integers(0, len(held), 2).tolist()) for _ in range(12)
            ]:
                part = bytearray(end - begin)
                reader.fill(begin, memoryview(part)[: len(held) - begin])
                assert part[: len(held) - begin] == held[begin:end], (kind.name, begin, end)
            part = bytearray(tensor.nbytes // tensor.shape[0])
            reader.rows(5, 7).fill(0, memoryview(part))
            assert part == held[5 * len(part) : 6 * len(part)]


def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    rows, columns = 4096, 1024
    for kind, architecture, leaf in ((Type.Q6_K, "llama", "attn_q"), (Type.Q8_0, "gpt2", "ffn_up")):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.add_head_count(8)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(f"blk.0.{leaf}.weight", np.zeros((rows, columns // block * size), np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (tensor,) = read(tmp_path / f"{architecture}.gguf", {}).values()
        held = memoryview(bytearray(tensor.nbytes))
        with tensor.open() as reader:
            reader.fill(0, held[:4])
            tracemalloc.start()
            reader.fill(0, held)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < tensor.nbytes // 2, architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_the_other_sides_without_a_head_too(tmp_path: Path, architecture: str) -> None:
    model = MODELS[architecture].build()
    path = write_gguf(tmp_path / "model.gguf", model, architecture)
    named = {name: (tensor.dtype, tensor.shape) for name, tensor in read(path, stored_names(model)).items()}
    other = {re.sub(r"^(model|transformer)\.", "", name): tensor for name, tensor in stored_names(model).items()}
    tensors = read(path, other)
    assert tensors.keys() == other.keys()
    assert [(tensor.dtype, tensor.shape) for tensor in tensors.values()] == list(named.values())


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_names_are_those_of_a_model_with_images(tmp_path: Path, prefix: str) -> None:
    model = MODELS["gemma3"].build()
    path = write_gguf(tmp_path / "model.gguf", model, "gemma3")
    other = {prefix + name.removeprefix("model."): tensor for name, tensor in stored_names(model).items()}
    vision = {"model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": next(iter(other.values()))}
    assert read(path, vision | other).keys() == other.keys()


def test_what_the_other_side_lacks_is_named_after_its_like(tmp_path: Path) -> None:
    model = MODELS["llama"].build()
    path = write_gguf(tmp_path / "model.gguf", model, "llama")
    other = {name: tensor for name, tensor in stored_names(model).items() if ".2." not in name}
    del other["lm_head.weight"], other["model.layers.0.mlp.up_proj.weight"]
    assert read(path, other).keys() == stored_names(model).keys()
    assert "blk.0.ffn_up.weight" in read(path, {name: other[name] for name in other if "up_proj" not in name})


def test_pruning_towards_a_gguf_file_is_pruning_towards_what_it_holds(tmp_path: Path) -> None:
    model = MODELS["llama"].build(seed=1)
    shake(model)
    path = write_gguf(tmp_path / "base.gguf", model, "llama", Type.Q8_0)
    save(tmp_path / "ft", MODELS["llama"].build(seed=1))
    save_file(fine_tuned(model.state_dict()), tmp_path / "ft" / "model.safetensors", metadata={"format": "pt"})
    save(tmp_path / "pre", model)
    save_file(loaded(path, model), tmp_path / "pre" / "model.safetensors", metadata={"format": "pt"})
    for pre, out in (("base.gguf", "out"), ("pre", "expected")):
        arguments = ["fapm", "--sparsity", "0.7", "--rest", "pre"]
        assert (
            main([*arguments, "--pre", str(tmp_path / pre), "--ft", str(tmp_path / "ft"), "--out", str(tmp_path / out)])
            == 0
        )
    found, expected = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    notes = json.loads((tmp_path / "out" / "surgery-report.json").read_text())["notes"]
    assert not notes


def test_a_gguf_file_as_ft_takes_its_config_from_pre(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pre, tuned = MODELS["qwen2"].build(seed=1, dtype=torch.bfloat16), MODELS["qwen2"].build(seed=1)
    tuned.load_state_dict(fine_tuned(tuned.state_dict()))
    save(tmp_path / "pre", pre)
    (tmp_path / "ft").mkdir()
    path = write_gguf(tmp_path / "ft" / "tuned-Q4_0.gguf", tuned, "qwen2", Type.Q4_0)
    out = tmp_path / "out"
    assert main(["fapm", "--pre", str(tmp_path / "pre"), "--ft", str(tmp_path / "ft"), "--out", str(out)]) == 0
    assert (out / "config.json").read_bytes() == (tmp_path / "pre" / "config.json").read_bytes()
    expected, base, found = loaded(path, tuned), pre.state_dict(), read_checkpoint(out)
    assert found.keys() == stored_names(tuned).keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        taken = (tensor == expected[name]) | (tensor == base[name].float())
        assert taken.all(), name
    share = (found["model.layers.0.mlp.up_proj.weight"] == expected["model.layers.0.mlp.up_proj.weight"]).float().mean()
    assert 0.05 < share < 0.15
    assert main(["fapm", "--pre", str(path), "--ft", str(path), "--out", str(tmp_path / "twice")]) == 1
    assert "Hugging Face format" in capsys.readouterr().err


def test_the_one_gguf_file_of_a_repository_is_its_weights() -> None:
    names = ["README.md", ".gitattributes", "Tiny-Q4_K_M.gguf"]
    assert choose(names, "it", CheckpointError) == Choice("gguf", ("Tiny-Q4_K_M.gguf",))
    with pytest.raises(CheckpointError, match=r"it: has 2 \.gguf files"):
        choose([*names, "Tiny-Q8_0.gguf"], "it", CheckpointError)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    model = MODELS["llama"].build()
    path = write_gguf(tmp_path / "model.gguf", model, "llama", Type.Q8_0)
    tensor = read(path, stored_names(model))["lm_head.weight"]
    assert isinstance(tensor.data, Blocks)
    with tensor.open() as reader, path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            reader.fill(tensor.nbytes - 4, memoryview(bytearray(4)))


def test_without_the_gguf_package_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS["llama"].build()
    path = write_gguf(tmp_path / "base.gguf", model, "llama")
    save(tmp_path / "ft", model)
    for name in ("gguf", "gguf.constants", "gguf.quants", "gguf.tensor_mapping"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["fapm", "--pre", str(path), "--ft", str(tmp_path / "ft"), "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'model-surgery[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
