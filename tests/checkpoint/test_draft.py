"""`surgery.checkpoint.draft`: the output appears at once or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.outputs import as_output
from safetensors import SafetensorError, safe_open

from surgery.checkpoint.draft import Draft
from surgery.checkpoint.listing import JOURNAL, REPORT
from surgery.checkpoint.output import check_output
from surgery.checkpoint.tensor import Span, Tensor
from surgery.errors import OutputError

NAME = "model.safetensors"
IDENTITY = {"ft": "this one", "command": ["surgery"]}


def draft(out: Path, *, resume: bool = False, replace: bool = False, extra: int = 0, **identity: Any) -> Draft:
    tensors = [Tensor(name, "F32", (2,), Span(Path("ft"), 0)) for name in ("a", "b")]
    return Draft(
        out, {NAME: (tensors, {"format": "pt"})}, IDENTITY | identity, resume=resume, replace=replace, extra=extra
    )


def fill(made: Draft, *names: str) -> None:
    for name in names:
        made.sink(name).write(4, b"5678")
        made.sink(name).write(0, b"1234")
        made.finish(name, {"kept": 1})


def test_commit(tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{{ }}")
    with draft(tmp_path / "deep/er/out") as made:
        fill(made, "b", "a")
        with pytest.raises(SafetensorError), safe_open(made.folder / NAME, "np"):
            pass
        made.commit({"README.md": b"# card"}, {"templates/one.jinja": tmp_path / "template"})
    assert os.listdir(tmp_path / "deep/er") == ["out"]  # noqa: PTH208
    files = {path.relative_to(tmp_path / "deep/er/out").as_posix() for path in (tmp_path / "deep/er/out").rglob("*.*")}
    assert files == {NAME, "README.md", "templates/one.jinja"}
    with safe_open(tmp_path / "deep/er/out" / NAME, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name).tobytes() for name in ("a", "b")} == {"a": b"12345678", "b": b"12345678"}


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), draft(tmp_path / "deep/er/out") as made:
        fill(made, "a")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with draft(tmp_path / "deep/er/out"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]


def test_too_small_a_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="bytes free, the output needs"):
        draft(tmp_path / "out", extra=1 << 62).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with draft(tmp_path / "out") as first:
        fill(first, "a")
        for resume in (False, True):
            with pytest.raises(OutputError, match="another surgery run is writing it"):
                draft(tmp_path / "out", resume=resume).__enter__()
        assert (first.folder / NAME).exists()
        fill(first, "b")
        first.commit({}, {})
    assert (tmp_path / "out" / NAME).stat().st_size > 16


def test_another_run_cannot_step_in_while_the_output_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step of the commit the draft is locked, so that nobody takes a finished folder for a leftover."""
    refused = []
    rename, unlink = Path.rename, Path.unlink

    def try_to_start(operation: Any) -> Any:
        def wrapped(path: Path, *arguments: Any) -> Any:
            if path.name.endswith("-draft"):
                with pytest.raises(OutputError, match="another surgery run"):
                    draft(tmp_path / "out").__enter__()
                refused.append(path)
            return operation(path, *arguments)

        return wrapped

    monkeypatch.setattr(Path, "rename", try_to_start(rename))
    monkeypatch.setattr(Path, "unlink", try_to_start(unlink))
    with draft(tmp_path / "out") as made:
        fill(made, "a", "b")
        made.commit({}, {})
    assert refused
    assert os.listdir(tmp_path / "out") == [NAME]  # noqa: PTH208


def test_resume(tmp_path: Path) -> None:
    first = draft(tmp_path / "out").__enter__()
    fill(first, "a")
    first._stop_syncer()
    first._sync()
    first._close()  # as a killed process would
    with pytest.raises(OutputError, match="differs in ft"):
        draft(tmp_path / "out", resume=True, ft="another one").__enter__()
    with draft(tmp_path / "out", resume=True, command=["surgery", "--workers", "1"]) as second:
        assert second.done == {"a": {"kept": 1}}
        assert second.identity["command"] == ["surgery"]
        fill(second, "b")
        second.commit({}, {})
    with safe_open(tmp_path / "out" / NAME, "np") as file:
        assert file.get_tensor("a").tobytes() == b"12345678"


def test_a_tensor_is_entered_only_after_its_bytes_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    real = os.fsync
    with draft(tmp_path / "out") as made:
        made._stop_syncer()
        fill(made, "a")

        def sync(file: int) -> None:
            order.append(file)
            real(file)

        monkeypatch.setattr(os, "fsync", sync)
        made._sync()
        assert order == [made.files[NAME], made.place.marker]


def test_a_failing_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync runs on a thread of its own: its failure must reach the caller."""
    with draft(tmp_path / "out") as made:
        made.failure = OSError(5, "Input/output error")
        with pytest.raises(OSError, match="Input/output error"):
            fill(made, "a")
        with pytest.raises(OutputError, match="Input/output error"):
            made.commit({}, {})
    assert list(tmp_path.iterdir()) == []


def test_replace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub/stale.safetensors").touch()
    with pytest.raises(OutputError, match="appeared while surgery worked"), draft(out) as made:
        made.commit({}, {})
    assert (out / "sub/stale.safetensors").exists()
    as_output(out)
    with draft(out, replace=True) as made:
        fill(made, "a", "b")
        made.commit({}, {})
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
    assert os.listdir(out) == [NAME]  # noqa: PTH208


def test_a_rename_that_fails_brings_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").touch()
    as_output(out)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.endswith("-draft"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="Input/output error"), draft(out, replace=True) as made:
        made.commit({}, {})
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
    assert sorted(os.listdir(out)) == ["old.safetensors", REPORT]  # noqa: PTH208


def test_writers_of_one_shard_do_not_disturb_each_other(tmp_path: Path) -> None:
    with draft(tmp_path / "out") as made:
        threads = [threading.Thread(target=fill, args=(made, name)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.commit({}, {})
    assert (tmp_path / "out" / NAME).read_bytes().endswith(b"12345678" * 2)


@pytest.mark.parametrize(
    ("out", "force", "said"),
    [
        ("ft", True, "inside the input"),
        ("ft/out", False, "inside the input"),
        ("link", True, "inside the input"),
        (".", True, "contains the input"),
        ("empty", False, "exists already"),
        ("file", True, "is a file"),
        ("mine", True, "holds config.json, and no surgery-report.json"),
    ],
)
def test_outputs_that_are_refused(tmp_path: Path, out: str, force: bool, said: str) -> None:
    for name in ("ft", "empty", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine/config.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("ft")
    with pytest.raises(OutputError, match=said):
        check_output(tmp_path / out, [tmp_path / "ft"], force=force)


def test_outputs_that_are_allowed(tmp_path: Path) -> None:
    for name in ("ft", "ft-fapm", "empty", "old"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/model.safetensors").touch()
    as_output(tmp_path / "old")
    (tmp_path / "dangling").symlink_to("target")
    for out, force in (("new", False), ("ft-2", False), ("empty", True), ("old", True)):
        assert check_output(tmp_path / out, [tmp_path / "ft"], force=force) == tmp_path / out
    assert check_output(tmp_path / "dangling", [tmp_path / "ft"], force=False) == tmp_path / "target"


def test_the_journal_is_no_part_of_the_output(tmp_path: Path) -> None:
    with draft(tmp_path / "out") as made:
        assert (made.folder / JOURNAL).exists()
        made.commit({}, {})
    assert not (tmp_path / "out" / JOURNAL).exists()
