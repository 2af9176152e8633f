"""`surgery.checkpoint.source`: which file holds a tensor, and folders that are no checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import INDEX, write_checkpoint
from safetensors.torch import save_file

from surgery.checkpoint.container import Container, Shard
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import Checkpoint, open_checkpoint
from surgery.errors import CheckpointError

TENSORS = {name: torch.full((2,), float(position)) for position, name in enumerate("abcd")}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a and c in the first shard, b and d in the second."""
    return write_checkpoint(tmp_path / "ft", TENSORS, shards=2)


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(str(path), companions=False))


def places(folder: Path) -> dict[str, str]:
    return {name: tensor.path.name for name, tensor in opened(folder).tensors.items()}


def reindex(folder: Path, **weight_map: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= weight_map
    (folder / INDEX).write_text(json.dumps(index))


def test_shards(folder: Path) -> None:
    assert places(folder) == {"a": FIRST, "c": FIRST, "b": SECOND, "d": SECOND}
    checkpoint = opened(folder)
    assert checkpoint.container == Container(
        {FIRST: Shard(("a", "c"), {"format": "pt"}), SECOND: Shard(("b", "d"), {"format": "pt"})}, {"total_size": 32}
    )


def test_a_single_file_stands_before_an_index(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert places(folder) == {"a": "model.safetensors"}
    assert opened(folder).container == Container({"model.safetensors": Shard(("a",), {})}, None)


def test_one_file_by_any_name(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SECOND).unlink()
    assert places(folder) == {"a": FIRST, "c": FIRST}


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(folder: Path) -> None:
    save_file({name: TENSORS[name] for name in "abc"}, folder / FIRST)
    assert places(folder) == {"a": FIRST, "c": FIRST, "b": SECOND, "d": SECOND}
    reindex(folder, b=FIRST)
    assert places(folder)["b"] == FIRST


def test_a_tensor_in_two_shards_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    for shard, names in ((FIRST, "acx"), (SECOND, "bdx")):
        save_file({name: torch.ones(1) for name in names}, folder / shard)
    with pytest.raises(CheckpointError, match="tensor x is in two shards"):
        places(folder)


def test_a_tensor_that_the_index_does_not_name_is_not_lost(folder: Path) -> None:
    save_file({name: torch.ones(1) for name in "bdx"}, folder / SECOND)
    assert places(folder)["x"] == SECOND


def test_a_stale_shard_is_not_read(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of an earlier run")
    assert set(places(folder)) == set("abcd")


@pytest.mark.parametrize(
    "shard",
    ["../outside/x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ".", "", "a\\x.safetensors", 7, None],
)
def test_an_index_that_points_elsewhere_is_refused(folder: Path, shard: object) -> None:
    (folder.parent / "outside").mkdir()
    shutil.copy(folder / FIRST, folder.parent / "outside/x.safetensors")
    reindex(folder, a=shard)
    with pytest.raises(CheckpointError, match="not a file of this folder; refused") as raised:
        places(folder)
    assert INDEX in str(raised.value)
    assert "tensor a" in str(raised.value)


@pytest.mark.parametrize("shard", ["README.md", "config.json", "surgery-journal.jsonl", "pytorch_model.bin"])
def test_a_shard_must_be_called_one(folder: Path, shard: str) -> None:
    """Under these names the output would hold something else."""
    (folder / SECOND).rename(folder / shard)
    reindex(folder, b=shard, d=shard)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        places(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ("", "JSON"),
    ],
)
def test_a_damaged_index(folder: Path, index: str, said: str) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=said):
        places(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "not a checkpoint"),
        (["a.safetensors", "b.safetensors"], "2 safetensors files but no"),
        (["adapter_config.json"], "adapter"),
        (["a.pth", "b.pth"], "2 .pth files"),
        (["consolidated.00.pth"], "consolidated.00.pth but no params.json"),
        (["tf_model.h5"], "tf_model.h5, which surgery does not read"),
        ([".hidden.safetensors"], "not a checkpoint"),
    ],
)
def test_no_checkpoint(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=said) as raised:
        places(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_no_tensor_and_no_config(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor"):
        places(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert opened(tmp_path).tensors.keys() == TENSORS.keys()
