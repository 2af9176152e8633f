"""`--force` replaces what surgery wrote, and nothing else; some places are never replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_llama_pair
from helpers.command import call, contents, refused
from helpers.outputs import as_output

from surgery.checkpoint.listing import REPORT

HMA = ("hma", "--pre", "pre", "--ft", "ft", "--out", "out")
FORCE = (*HMA, "--force")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pair, and an output of surgery."""
    tiny_llama_pair(tmp_path)
    (tmp_path / "ft/tokenizer").mkdir()
    (tmp_path / "ft/tokenizer/merges.txt").write_text("a b")
    assert call(*HMA, cwd=tmp_path)[0] == 0
    return tmp_path


def test_the_report_lists_every_file(root: Path) -> None:
    listed = json.loads((root / "out" / REPORT).read_bytes())["files"]
    there = {path.relative_to(root / "out").as_posix(): path for path in (root / "out").rglob("*") if path.is_file()}
    assert listed.keys() | {REPORT} == there.keys()
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        name: path.stat().st_size for name, path in there.items() if name != REPORT
    }
    digests = contents(root / "out")
    assert {name: entry["sha256"] for name, entry in listed.items() if "sha256" in entry} == {
        name: digests[name] for name in listed if not name.endswith(".safetensors")
    }


def test_an_output_is_replaced(root: Path) -> None:
    before = contents(root)
    assert call(*FORCE, "--ratios", "0.1", cwd=root)[0] == 0
    after = contents(root)
    assert after.keys() == before.keys()
    assert {name.split("/")[0] for name in after if after[name] != before[name]} == {"out"}


def edit_text(path: Path) -> None:
    """Change a file, and keep its size."""
    raw = path.read_bytes()
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])


def to_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


# what is done to an output -> what the refusal names
CHANGES: dict[str, Callable[[Path], object]] = {
    "thesis.tex": lambda out: (out / "thesis.tex").write_text("mine"),
    ".hidden": lambda out: (out / ".hidden").write_text("mine"),
    "firmware.bin": lambda out: (out / "firmware.bin").write_bytes(b"mine"),
    "photos": lambda out: (out / "photos").mkdir(),
    "tokenizer/deep.txt": lambda out: (out / "tokenizer/deep.txt").write_text("mine"),
    "README.md": lambda out: (out / "README.md").write_text("a card of my own"),
    "config.json": lambda out: edit_text(out / "config.json"),
    "model-00001-of-00002.safetensors": lambda out: (out / "model-00001-of-00002.safetensors").write_bytes(
        b"trained on"
    ),
    "tokenizer/merges.txt": lambda out: to_link(out / "tokenizer/merges.txt", "../../ft/tokenizer/merges.txt"),
    "older surgery": lambda out: change_report(out, lambda report: report.pop("files")),
    REPORT: lambda out: (out / REPORT).write_text("{}"),
    f"no {REPORT}": lambda out: (out / REPORT).unlink(),
    "it holds .git": lambda out: (out / ".git").mkdir(),
}


def change_report(out: Path, change: Callable[[dict[str, object]], object]) -> None:
    report = json.loads((out / REPORT).read_bytes())
    change(report)
    (out / REPORT).write_text(json.dumps(report))


@pytest.mark.parametrize("named", CHANGES)
def test_anything_else_in_it_is_a_refusal_that_names_it(root: Path, named: str) -> None:
    CHANGES[named](root / "out")
    refused(root, *FORCE, says=(named, "out"))


def test_files_that_the_user_removed_from_an_output_do_not_matter(root: Path) -> None:
    (root / "out/README.md").unlink()
    shutil.rmtree(root / "out/tokenizer")
    assert call(*FORCE, cwd=root)[0] == 0


def test_places_that_are_never_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where everything in them is surgery's: a home folder, the current one, and those that hold them; a file system."""
    out = ("hma", "--pre", str(root / "pre"), "--ft", str(root / "ft"), "--force", "--out")
    work = as_output(root / "out")
    home = root / "users/me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    refused(root, *out, "~", says=("home folder",))
    refused(root, *out, str(root / "users"), says=("home folder",))
    monkeypatch.setenv("HOME", "/nowhere")
    refused(work, *out, ".", says=("current folder",))
    (work / "inner").mkdir()
    refused(work / "inner", *out, "..", says=("current folder",))
    refused(root, *out, "/", says=("contains the input",))
    monkeypatch.setattr(os.path, "ismount", lambda path: path == home)
    refused(root, *out, str(home), says=("root of a file system",))


def test_a_stranger_s_folder_with_the_name_of_an_old_output_stays(root: Path) -> None:
    (root / ".out.surgery-old").mkdir()
    (root / ".out.surgery-old/thesis.tex").write_text("mine")
    assert call(*FORCE, cwd=root)[0] == 0
    assert sorted(os.listdir(root)) == [".out.surgery-old", "ft", "out", "pre"]  # noqa: PTH208
    assert (root / ".out.surgery-old/thesis.tex").read_text() == "mine"
    shutil.rmtree(root / ".out.surgery-old")
    (root / "elsewhere").mkdir()
    (root / ".out.surgery-old").symlink_to("elsewhere")
    assert call(*FORCE, cwd=root)[0] == 0
    assert (root / ".out.surgery-old").is_symlink()
    assert (root / "elsewhere").is_dir()
