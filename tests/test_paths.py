"""Files that commands write: never over an input, by whatever name, nor over anything that surgery did not write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_llama_pair
from helpers.command import call, contents, refused

DIFF = ("diff", "--pre", "pre", "--ft", "ft")
WRITTEN = {"--csv": (".csv",), "--plot": (".png", ".svg", ".pdf")}
NAMES = [(option, ending) for option, endings in WRITTEN.items() for ending in endings]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_llama_pair(tmp_path)
    return tmp_path


@pytest.fixture
def asked(root: Path) -> Path:
    (root / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return root


@pytest.mark.parametrize(("option", "ending"), NAMES)
def test_an_earlier_file_of_the_same_kind_is_replaced(root: Path, option: str, ending: str) -> None:
    name = f"made{ending}"
    for _ in range(2):
        assert call(*DIFF, option, name, cwd=root)[0] == 0
    before = (root / name).read_bytes()
    (root / "link").symlink_to(name)
    (root / f"link{ending}").symlink_to(name)
    assert call(*DIFF, "--tensor", "model.norm.weight", option, f"link{ending}", cwd=root)[0] == 0
    assert (root / f"link{ending}").is_symlink()
    assert (root / name).read_bytes() != before


@pytest.mark.parametrize(("option", "ending"), NAMES)
def test_anything_else_is_not(root: Path, option: str, ending: str) -> None:
    """What another program wrote, a file of another kind with the same ending, a folder, a pipe."""
    name = f"mine{ending}"
    foreign = {".csv": b"a,b\n1,2\n", ".png": png(), ".svg": b"<?xml version='1.0'?><svg/>", ".pdf": b"%PDF-1.4\n"}
    for content in (foreign[ending], b"x", b"\0" * 10):
        (root / name).write_bytes(content)
        refused(root, *DIFF, option, name, says=(f"{option} {name}", "surgery wrote", "Move it away"))
    (root / name).unlink()
    os.mkfifo(root / name)
    refused(root, *DIFF, option, name, says=(option, "surgery wrote"))
    (root / name).unlink()
    (root / name).mkdir()
    refused(root, *DIFF, option, name, says=(option, "is a folder"))


def png() -> bytes:
    """A picture that matplotlib drew for somebody else."""
    import io

    from matplotlib.figure import Figure

    content = io.BytesIO()
    Figure((1, 1)).savefig(content, format="png")
    return content.getvalue()


@pytest.mark.parametrize(("option", "ending"), NAMES)
def test_inputs_are_never_written(root: Path, option: str, ending: str) -> None:
    """Nor by a link, nor by another name of a file, nor where one is of the kind that would be replaced."""
    assert call(*DIFF, option, f"made{ending}", cwd=root)[0] == 0
    shutil.copy(root / f"made{ending}", root / f"ft/table{ending}")
    os.link(root / f"ft/table{ending}", root / f"other{ending}")
    (root / f"link{ending}").symlink_to(f"ft/table{ending}")
    (root / f"dangling{ending}").symlink_to(f"ft/new{ending}")
    (root / "folder").symlink_to("ft")
    for name in ("ft/table", "ft/new", "other", "link", "dangling", "folder/table", "./pre/../ft/table"):
        refused(root, *DIFF, option, f"{name}{ending}", says=(option, "input", "never written to"))


def test_norms_are_never_saved_over_weights(root: Path) -> None:
    from surgery.calibrate.cache import save
    from surgery.errors import OutputError

    shard = next((root / "ft").glob("*.safetensors"))
    os.link(shard, root / "norms.safetensors")
    before = contents(root)
    with pytest.raises(OutputError, match="no file of norms that surgery wrote"):
        save(root / "norms.safetensors", {}, {"weights": ""})
    with pytest.raises(OutputError, match="another name of the input"):
        save(root / "norms.safetensors", {}, {"weights": ""}, [root / "ft"])
    assert contents(root) == before
    for _ in range(2):
        save(root / "mine.safetensors", {}, {"weights": ""})


@pytest.mark.parametrize("held", ["index.html", "results.csv", "items.csv", "pareto.png", "results.json", "thesis.tex"])
def test_a_report_folder_that_holds_something_else_is_left_alone(asked: Path, held: str) -> None:
    (asked / "folder").mkdir()
    (asked / "folder" / held).write_text('{"kind": "mine"}')
    if held not in ("results.json", "thesis.tex"):  # beside results of surgery
        (asked / "folder/results.json").write_text(json.dumps({"kind": "compare", "rows": []}))
    words = ("compare", "--pre", "pre", "--ft", "ft", "--task", "task.jsonl", "--general", "task.jsonl")
    refused(asked, *words, "--report", "folder", says=("--report",))


def test_a_cache_is_never_in_an_input(asked: Path) -> None:
    words = ("compare", "--pre", "pre", "--ft", "ft", "--task", "task.jsonl", "--general", "task.jsonl")
    refused(asked, *words, "--cache", "ft/cache", says=("--cache", "ft", "never written to"))


def test_the_home_folder_is_meant_by_a_tilde(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    inner = root / "inner"
    inner.mkdir()
    pair = ("--pre", "~/pre", "--ft", "~/ft")
    for words in (
        ("extract", *pair, "--method", "hma", "--out", "~/delta.safetensors"),
        ("apply", "--pre", "~/pre", "--delta", "~/delta.safetensors", "--out", "~/out"),
        ("verify", "~/out"),
        ("diff", *pair, "--csv", "~/table.csv"),
    ):
        code, _, err = call(*words, cwd=inner)
        assert (code, err) == (0, ""), words
    assert {path.name for path in root.iterdir()} == {"pre", "ft", "inner", "delta.safetensors", "out", "table.csv"}
    assert list(inner.iterdir()) == []
    for unknown in (
        ("apply", "--pre", "pre", "--delta", "~no-such-user/delta.safetensors"),
        ("verify", "~no-such-user/out"),
        ("diff", "--pre", "pre", "--ft", "ft", "--csv", "~no-such-user/table.csv"),
    ):
        refused(root, *unknown, says=("~no-such-user",))


def test_scores_of_a_search_are_never_kept_in_an_input(asked: Path) -> None:
    words = ("fapm", "--pre", "pre", "--ft", "ft", "--sparsity", "auto", "--max-forgetting", "0.1")
    scores = ("--task", "task.jsonl", "--general", "task.jsonl", "--cache", "ft/cache")
    refused(asked, *words, *scores, says=("--cache", "never written to"))
