"""The output is ft with other numbers: the same files, names, shapes and types, and nothing that anybody else wrote."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    INDEX,
    SHARDS,
    WEIGHT,
    Tensors,
    change_index,
    change_tensors,
    fine_tuned,
    read_checkpoint,
    tiny_llama,
    tiny_llama_pair,
    write_checkpoint,
)
from helpers.command import call, contents, refused
from helpers.outputs import as_output
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.tensor import Span

METHODS = {
    "fapm": "ft-fapm-0.9",
    "magnitude": "ft-magnitude-0.9",
    "breadcrumbs": "ft-breadcrumbs-0.9",
    "salience": "ft-salience-1.5",
    "half-reset": "ft-half-reset-0.5",
    "hma": "ft-hma-0.5",
    "lines": "ft-lines-0",
    "dg-hard": "ft-dg-hard-1",
    "ties": "ft-ties-0.8",
    "dare": "ft-dare-0.9",
}
PAIR = ("--pre", "pre", "--ft", "ft")


def edit(root: Path, *words: str) -> Path:
    """Run a command that must succeed and return the output's folder."""
    code, out, err = call(*words, *(PAIR if "--ft" not in words else ()), cwd=root)
    assert (code, err) == (0, "")
    return Path(out.splitlines()[-1].removeprefix("Wrote "))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_llama_pair(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_shaped_like_ft(root: Path, method: str) -> None:
    """Shards, tensors, types, metadata, index and companions; and the inputs are what they were."""
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
        (root / "ft" / name).write_text(name)
    for name in ("README.md", "optimizer.pt", "trainer_state.json"):
        (root / "ft" / name).write_text("of the training")
    shutil.copytree(root / "ft", root / "ft/checkpoint-500")
    before = contents(root)
    out = edit(root, method)
    assert out == root / METHODS[method]
    assert {name: mark for name, mark in contents(root).items() if name.split("/")[0] != out.name} == before
    after = contents(out)
    same = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"]
    assert set(after) == {*same, *SHARDS, INDEX, "README.md", "surgery-report.json"}
    assert {name: after[name] for name in same} == {name: before[f"ft/{name}"] for name in same}
    assert json.loads((out / INDEX).read_text()) == json.loads((root / "ft" / INDEX).read_text())
    for shard in SHARDS:
        old, new = read_header(root / "ft" / shard), read_header(out / shard)
        assert new.metadata == old.metadata == {"format": "pt"}
        assert [(t.name, t.dtype, t.shape) for t in new.tensors.values()] == [
            (t.name, t.dtype, t.shape) for t in old.tensors.values()
        ]
        for _ in range(2):
            with safe_open(out / shard, "pt") as file:
                assert set(file.keys()) == set(old.tensors)
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    changed = [
        name for name, tensor in read_checkpoint(out).items() if not tensor.equal(read_checkpoint(root / "ft")[name])
    ]
    assert changed


@pytest.mark.parametrize(("pre_shards", "ft_shards"), [(1, 2), (3, 1), (2, 3)])
def test_the_cut_into_shards_does_not_matter(tmp_path: Path, pre_shards: int, ft_shards: int) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    for name, cut in (("one", (1, 1)), ("other", (pre_shards, ft_shards))):
        write_checkpoint(tmp_path / name / "pre", dict(reversed(pre.items())) if name == "one" else pre, shards=cut[0])
        write_checkpoint(tmp_path / name / "ft", ft, shards=cut[1])
    one, other = (read_checkpoint(edit(tmp_path / name, "fapm")) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def odd_tensors(pre: Tensors) -> Tensors:
    """What checkpoints also hold, in a file where it leaves everything else unaligned."""
    return {
        "model.layers.0.self_attn.bias": torch.ones(3, 3, dtype=torch.bool),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.0.self_attn.seen": torch.tensor(7),
        "model.layers.0.self_attn.q_proj.bias": torch.rand(16).bfloat16(),
        "model.layers.0.mlp.empty.weight": torch.zeros(0, 16, dtype=torch.bfloat16),
        "mask": torch.ones(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
    }


@pytest.mark.parametrize("method", METHODS)
def test_odd_tensors_are_kept(tmp_path: Path, method: str) -> None:
    """Buffers, integers, truths, empty tensors and scalars, whether pre has them or not."""
    pre = tiny_llama()
    odd = odd_tensors(pre)
    write_checkpoint(tmp_path / "pre", pre | odd)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre) | odd | {"value_head.extra": torch.rand(3)})
    tensors = read_header(tmp_path / "ft/model.safetensors").tensors.values()
    assert any(isinstance(tensor.data, Span) and tensor.data.begin % 2 for tensor in tensors)
    out = read_checkpoint(edit(tmp_path, method))
    ft = read_checkpoint(tmp_path / "ft")
    assert out.keys() == ft.keys()
    for name in (*odd, "value_head.extra"):
        assert out[name].equal(ft[name]), name


def test_tensors_that_only_ft_has_are_copied_and_reported(root: Path) -> None:
    extra = {"model.layers.1.self_attn.q_proj.bias": torch.rand(16), "score.weight": torch.rand(2, 16)}
    change_tensors(root / "ft", lambda tensors: tensors.update(extra))
    out = edit(root, "fapm")
    found = load_file(out / "model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in extra.items())
    report = json.loads((out / "surgery-report.json").read_text())
    assert {line["name"] for line in report["tensors"] if line["action"] == "copied"} == extra.keys()
    assert any(all(name in note for name in extra) for note in report["notes"])


def test_a_tensor_present_twice_is_the_one_of_the_index(root: Path) -> None:
    """The other shard holds another value of it, of an earlier run; for ft and for pre."""
    for side in ("pre", "ft"):
        shards = json.loads((root / side / INDEX).read_text())["weight_map"]
        wrong = root / side / next(shard for shard in SHARDS if shard != shards[WEIGHT])
        tensors = load_file(wrong)
        save_file(tensors | {WEIGHT: torch.full((48, 16), 99.0).bfloat16()}, wrong, metadata={"format": "pt"})
    out = edit(root, "hma")
    pre, ft = (load_file(root / side / shards[WEIGHT])[WEIGHT].float() for side in ("pre", "ft"))
    assert torch.allclose(read_checkpoint(out)[WEIGHT].float(), (pre + ft) / 2, atol=1e-2)


def test_a_single_file_stands_before_an_index(root: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in read_checkpoint(root / "ft").items()}
    save_file(tensors, root / "ft/model.safetensors")
    out = edit(root, "half-reset", "--ratio", "0")
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    assert all(not tensor.any() for tensor in read_checkpoint(out).values())


def test_nothing_of_an_earlier_output_stays(root: Path) -> None:
    """An earlier run's shards, index and tokenizer are not mixed into the result."""
    out = root / "ft-fapm-0.9"
    write_checkpoint(out, {"stale": torch.ones(1)}, shards=3)
    (out / "sub").mkdir()
    for name in ("vocab.txt", "model.safetensors", "sub/x.json"):
        (out / name).write_text("stale")
    as_output(out)
    change_tensors(root / "ft", lambda tensors: None)
    edit(root, "fapm", "--force")
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "surgery-report.json",
    }
    assert "stale" not in load_file(out / "model.safetensors")


def test_hard_links_between_output_and_input_do_not_harm_the_input(root: Path) -> None:
    out = root / "ft-hma-0.5"
    out.mkdir()
    for path in (root / "ft").iterdir():
        os.link(path, out / path.name)
    as_output(out)
    before = contents(root / "ft")
    edit(root, "hma", "--force")
    assert contents(root / "ft") == before
    assert contents(out)[SHARDS[0]] != before[SHARDS[0]]


def test_an_output_that_is_a_link(root: Path) -> None:
    """Where it leads is replaced, and the link stays; into an input it is refused."""
    as_output(write_checkpoint(root / "elsewhere", {"old": torch.ones(1)}))
    (root / "out").symlink_to("elsewhere")
    edit(root, "hma", "--out", "out", "--force")
    assert (root / "out").is_symlink()
    assert "old" not in read_checkpoint(root / "elsewhere")
    (root / "out").unlink()
    (root / "out").symlink_to("pre")
    refused(root, "hma", *PAIR, "--out", "out", "--force", says=("pre, which is never written to",))


def test_an_existing_folder_wins_over_a_revision(root: Path) -> None:
    shutil.copytree(root / "ft", root / "ft@v1")
    change_tensors(root / "ft", lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    for typed in ("./ft@v1", "ft@v1"):
        out = edit(root, "half-reset", "--ratio", "0", "--pre", "pre", "--ft", typed, "--force")
        assert out == root / "ft@v1-half-reset-0"
        assert read_checkpoint(out)[WEIGHT].equal(read_checkpoint(root / "ft@v1")[WEIGHT])


def test_a_failed_run_leaves_the_old_output(root: Path) -> None:
    edit(root, "fapm")
    before = contents(root / "ft-fapm-0.9")
    change_tensors(root / "ft", lambda tensors: tensors[WEIGHT].fill_(float("nan")))
    refused(root, "fapm", *PAIR, "--force", says=("NaN",))
    assert contents(root / "ft-fapm-0.9") == before


def test_an_index_without_metadata_and_with_a_stale_shard(root: Path) -> None:
    change_index(root / "ft", lambda index: index.pop("metadata"))
    (root / "ft/model-00003-of-00003.safetensors").write_bytes(b"of an earlier run")
    out = edit(root, "magnitude")
    assert json.loads((out / INDEX).read_text())["weight_map"].keys() == read_checkpoint(out).keys()
    assert not (out / "model-00003-of-00003.safetensors").exists()


def test_an_input_of_links_is_read_through_them(root: Path) -> None:
    """As in the hub's cache, where a snapshot's files are links into a folder of blobs."""
    expected = contents(edit(root, "fapm"))
    for side in ("pre", "ft"):
        (root / side).rename(root / f"{side}-blobs")
        (root / side).mkdir()
        for number, path in enumerate(sorted((root / f"{side}-blobs").iterdir())):
            path.rename(path.with_name(f"blob-{number}"))
            (root / side / path.name).symlink_to(f"../{side}-blobs/blob-{number}")
    found = contents(edit(root, "fapm", "--force"))
    for name in (*SHARDS, INDEX, "config.json"):
        assert found[name] == expected[name]
    assert not any(path.is_symlink() for path in (root / "ft-fapm-0.9").iterdir())


def test_names_that_are_not_plain(tmp_path: Path) -> None:
    """Folders with spaces, brackets, colons, accents, and bytes that are no UTF-8."""
    for name in ("a b", "[red]x[v2]", ":smile:", "é層", os.fsdecode(b"caf\xe9")):
        root = tmp_path / name
        root.mkdir()
        tiny_llama_pair(root)
        pre, ft = str(root / "pre"), str(root / "ft")
        code, out, err = call("fapm", "--pre", pre, "--ft", ft, cwd=tmp_path)
        assert (code, err) == (0, "")
        shown = str(root / "ft-fapm-0.9").encode(errors="backslashreplace").decode()
        assert out.splitlines()[-1] == f"Wrote {shown}"
        assert json.loads((root / "ft-fapm-0.9/surgery-report.json").read_bytes())["ft"]["typed"] == ft


def test_ft_equal_to_pre_comes_back_as_it_is(root: Path) -> None:
    shutil.rmtree(root / "ft")
    shutil.copytree(root / "pre", root / "ft")
    for method in METHODS:
        out = edit(root, method)
        assert all((out / shard).read_bytes()[-64:] == (root / "ft" / shard).read_bytes()[-64:] for shard in SHARDS)
        assert all(tensor.equal(read_checkpoint(root / "pre")[name]) for name, tensor in read_checkpoint(out).items())
