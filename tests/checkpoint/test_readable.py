"""Files that are none: pipes, devices and sockets are refused at once wherever a checkpoint has files, and nothing waits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from helpers.checkpoints import INDEX, tiny_llama_pair
from helpers.command import surgery

from surgery.data.records import local
from surgery.errors import OptionError

PAIR = ("--pre", "pre", "--ft", "ft")
SHARD = "model-00001-of-00002.safetensors"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe.txt.lock"))
    path.symlink_to(path.with_name("pipe.txt.lock").name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    home = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(home)


@pytest.mark.parametrize("kind", [fifo, linked_fifo, device, listening], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, kind: object) -> None:
    tiny_llama_pair(tmp_path)
    place = tmp_path / "ft" / name
    place.unlink(missing_ok=True)
    kind(place)  # type: ignore[operator]
    done = surgery("fapm", *PAIR, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr or "pipe.txt.lock" in done.stderr


@pytest.mark.parametrize(
    "words", [("extract", "--method", "fapm", "--out", "d.safetensors"), ("diff",)], ids=lambda w: w[0]
)
def test_every_command_refuses_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    tiny_llama_pair(tmp_path)
    shard = tmp_path / "ft" / SHARD
    shard.unlink()
    fifo(shard)
    done = surgery(*words, *PAIR, cwd=tmp_path)
    assert done.returncode == 1
    assert "no regular file" in done.stderr


def test_data_from_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").symlink_to("/dev/zero")
    with pytest.raises(OptionError, match="no regular file"):
        local(str(tmp_path / "data.jsonl"))
