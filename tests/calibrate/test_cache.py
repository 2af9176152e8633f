"""Norms in a file come back as they were, and only for the weights that they were made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery.calibrate.cache import load, save, stored_key
from surgery.errors import OptionError, OutputError
from surgery.methods.wanda import Norm

KEY: dict[str, Any] = {"weights": "ab" * 32, "tokens_sha256": "cd" * 32, "seed": 0, "samples": 128}


def norms() -> dict[str, Norm]:
    draw = np.random.default_rng(0)
    return {
        "linear.weight": Norm(draw.random(7, np.float32), False, 20),
        "conv1d.weight": Norm(draw.random(5, np.float32), True, 20),
        "experts.down_proj": Norm(draw.random((3, 4), np.float32), True, np.array([5, 0, 2**40])),
    }


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "norms.safetensors"
    save(path, norms(), KEY)
    loaded = load(path, KEY)
    assert loaded.keys() == norms().keys()
    for name, norm in norms().items():
        assert loaded[name].values.dtype == np.float32
        np.testing.assert_array_equal(loaded[name].values, norm.values)
        np.testing.assert_array_equal(loaded[name].tokens, norm.tokens)
        assert loaded[name].transposed == norm.transposed
    assert type(loaded["linear.weight"].tokens) is int
    assert stored_key(path) == KEY
    # By the library, too.
    np.testing.assert_array_equal(load_file(path)["conv1d.weight:values"], norms()["conv1d.weight"].values)
    assert [file.name for file in tmp_path.iterdir()] == ["norms.safetensors"]


def test_a_part_of_the_key_may_be_asked_for_alone(tmp_path: Path) -> None:
    save(tmp_path / "n.safetensors", norms(), KEY)
    assert load(tmp_path / "n.safetensors", {"weights": KEY["weights"]}).keys() == norms().keys()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weights": "00" * 32}, "other weights"),
        ({"seed": 1}, "made with seed 0, not 1"),
        ({"dtype": "F32"}, "dtype null"),
    ],
)
def test_norms_of_something_else_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    save(tmp_path / "n.safetensors", norms(), KEY)
    with pytest.raises(OptionError, match=complaint) as caught:
        load(tmp_path / "n.safetensors", {**KEY, **change})
    assert "n.safetensors" in str(caught.value)


def damaged(tmp_path: Path, tensors: dict[str, Any] | None = None, **metadata: Any) -> Path:
    path = tmp_path / "n.safetensors"
    good = {"format": "surgery-input-norms", "key": json.dumps(KEY), "transposed": "[]"}
    save_file(tensors or {"a:values": np.ones(3, np.float32), "a:tokens": np.array(1)}, path, {**good, **metadata})
    return path


def test_a_sound_file_of_another_hand_is_read(tmp_path: Path) -> None:
    assert load(damaged(tmp_path), KEY)["a"].tokens == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"format": "pt"},
        {"key": "{"},
        {"key": "[]"},
        {"transposed": "7"},
        {"transposed": "[[]]"},
        {"key": "[" * 100_000},
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"holds no norms|metadata is damaged"):
        load(damaged(tmp_path, **metadata), KEY)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a:values": np.ones(3, np.float32)},
        {"a:values": np.ones(3, np.float64), "a:tokens": np.array(1)},
        {"a:values": np.ones((2, 3), np.float32), "a:tokens": np.array(1)},
        {"a:values": np.ones((2, 3), np.float32), "a:tokens": np.ones(3, np.int64)},
        {"a:values": np.ones(3, np.float32), "a:tokens": np.array(1, np.int32)},
        {"a:values": np.array(1, np.float32), "a:tokens": np.array(1)},
    ],
)
def test_damaged_tensors_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="of a is damaged"):
        load(damaged(tmp_path, tensors), KEY)


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OptionError, match="truncated"):
        load(path, KEY)
    with pytest.raises(OptionError, match="no such file"):
        load(tmp_path / "none.safetensors", KEY)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="`save_norms`"):
        save(tmp_path / "none" / "n.safetensors", norms(), KEY)
    with pytest.raises(OutputError, match="must end in"):
        save(tmp_path / "n.bin", norms(), KEY)
    assert not list(tmp_path.iterdir())
