"""`surgery.checkpoint.companions`: what a loader needs travels, what belongs to the training stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write_checkpoint

from surgery.checkpoint.companions import companions
from surgery.errors import CheckpointError

TRAVEL = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json"),
    *("modeling_own.py", "1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE"),
]
STAY = [
    *("README.md", "surgery-report.json", "surgery-journal.jsonl", "trainer_state.json", "training_args.bin"),
    *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.fp16.safetensors"),
    *("checkpoint-500/config.json", "checkpoint-500/optimizer.pt", "global_step500/mp_rank_00_model_states.pt"),
    *("original/params.json", "runs/Nov01/events.out", ".git/config", ".gitattributes", "__pycache__/own.pyc"),
]


@pytest.fixture
def ft(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ft", {"model.norm.weight": torch.ones(1)})


def found(ft: Path) -> dict[str, Path]:
    return companions(ft)


def test_what_travels_and_what_stays(ft: Path) -> None:
    for name in TRAVEL + STAY:
        (ft / name).parent.mkdir(parents=True, exist_ok=True)
        (ft / name).write_text(name)
    (ft / "config.json").write_text("{}")
    assert found(ft) == {name: ft / name for name in TRAVEL}


def test_links_to_files_are_followed_and_folders_elsewhere_are_not(ft: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (ft / "tokenizer.json").symlink_to("../blob")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.txt").touch()
    (ft / "elsewhere").symlink_to("../elsewhere")
    (ft / "round").symlink_to(".")
    assert set(found(ft)) == {"config.json", "tokenizer.json"}


def test_a_broken_link_is_refused_before_the_work(ft: Path) -> None:
    (ft / "optimizer.pt").symlink_to("gone")  # left out, so no matter
    assert set(found(ft)) == {"config.json"}
    (ft / "tokenizer.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to gone, which does not exist"):
        found(ft)
