"""The hidden folder beside an output: surgery's own is recognised by its marker, and nobody else's is entered or removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_llama_pair
from helpers.command import call, contents

from surgery.checkpoint.beside import Beside
from surgery.checkpoint.listing import JOURNAL
from surgery.errors import OutputError

PAIR = ("--pre", "pre", "--ft", "ft")
# A command -> the folder that it works in.
RUNS = {
    ("hma", *PAIR, "--out", "out"): ".out.surgery-draft",
    ("hma", *PAIR, "--out", "out", "--resume"): ".out.surgery-draft",
    ("extract", *PAIR, "--method", "hma", "--out", "out.safetensors"): ".out.safetensors.surgery-draft",
}


def put(path: Path, content: str = "mine") -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(content)


def link_marker(folder: Path) -> None:
    """A marker that is a link to a marker of surgery."""
    put(folder.parent / "elsewhere" / JOURNAL, marker(folder))
    folder.mkdir()
    (folder / JOURNAL).symlink_to(folder.parent / "elsewhere" / JOURNAL)


def hard_link_marker(folder: Path) -> None:
    put(folder.parent / "elsewhere" / JOURNAL, marker(folder))
    folder.mkdir()
    os.link(folder.parent / "elsewhere" / JOURNAL, folder / JOURNAL)


def link_folder(folder: Path) -> None:
    """A link to a folder with a marker of surgery."""
    put(folder.parent / "elsewhere" / JOURNAL, marker(folder))
    put(folder.parent / "elsewhere/model.safetensors")
    folder.symlink_to("elsewhere")


def marker(folder: Path, **more: str) -> str:
    line = {"surgery": "surgery-draft", "output": folder.name[1:].removesuffix(".surgery-draft")}
    return json.dumps(line | more) + "\n"


def empty_marker(folder: Path) -> None:
    put(folder / JOURNAL, "")
    put(folder / "thesis.tex")


def pipe_marker(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / JOURNAL)


# What somebody else may have there.
OTHERS: dict[str, Callable[[Path], object]] = {
    "a folder of mine": lambda folder: put(folder / "thesis.tex"),
    "a folder with a journal of mine": lambda folder: put(folder / JOURNAL, "Dear diary\n"),
    "a folder with an empty journal, and more": empty_marker,
    "a draft of another output": lambda folder: put(folder / JOURNAL, marker(folder, output="another")),
    "a file": put,
    "a link to a folder": link_folder,
    "a dangling link": lambda folder: folder.symlink_to("nowhere"),
    "a link as marker": link_marker,
    "a hard link as marker": hard_link_marker,
    "a pipe": os.mkfifo,
    "a pipe as marker": pipe_marker,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("words", RUNS, ids=lambda words: words[0] + words[-1])
def test_what_somebody_else_has_there_is_left_alone(tmp_path: Path, words: tuple[str, ...], other: str) -> None:
    tiny_llama_pair(tmp_path)
    OTHERS[other](tmp_path / RUNS[words])
    before = contents(tmp_path)
    code, _, err = call(*words, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert {name: mark for name, mark in contents(tmp_path).items() if not name.startswith("out")} == before


def test_a_draft_under_a_new_name_is_found_again(tmp_path: Path) -> None:
    put(tmp_path / ".out.surgery-draft/thesis.tex")
    first = Beside(tmp_path / "out", "surgery-draft", JOURNAL)
    first.take()
    first.begin(ft="this")
    assert first.folder.name.startswith(".out.surgery-draft-")
    with pytest.raises(OutputError, match="another surgery run"):
        Beside(tmp_path / "out", "surgery-draft", JOURNAL).take()
    first.release()
    second = Beside(tmp_path / "out", "surgery-draft", JOURNAL)
    assert json.loads(second.take())["ft"] == "this"
    assert second.folder == first.folder
    assert second.remove() == []
    assert [path.name for path in tmp_path.iterdir()] == [".out.surgery-draft"]


def test_weights_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill meanwhile leaves nothing that looks like a model."""
    made = Beside(tmp_path / "out", "surgery-draft", JOURNAL)
    made.take()
    for name in ("a.json", "model.safetensors", "z.safetensors", "sub"):
        put(made.folder / name) if "." in name else (made.folder / name).mkdir()
    order = []

    def noting(operation: Callable[[Path], object]) -> Callable[[Path], None]:
        def noted(path: Path) -> None:
            order.append(path.name)
            operation(path)

        return noted

    monkeypatch.setattr(Path, "unlink", noting(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", noting(shutil.rmtree))
    assert made.remove() == []
    assert order == ["model.safetensors", "z.safetensors", "a.json", "sub", JOURNAL]


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Beside(tmp_path / "out", "surgery-draft", JOURNAL)
    made.take()
    put(made.folder / "a.json")

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "unlink", fails)
    (said,) = made.remove()
    assert str(made.folder) in said
    assert "could not be removed" in said
