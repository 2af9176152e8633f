"""Who writes which files of a draft, and who may enter it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint.draft import Draft
from surgery.checkpoint.part import Part, find_part
from surgery.checkpoint.tensor import Span, Tensor
from surgery.errors import OptionError, OutputError

IDENTITY = {"ft": "this one", "parts": 2, "command": ["surgery"]}


def draft(out: Path, part: Part | None, *, resume: bool = False) -> Draft:
    shards: Any = {f"{name}.safetensors": ([Tensor(name, "F32", (2,), Span(Path("ft"), 0))], {}) for name in "ab"}
    identity = IDENTITY if part else {"ft": "this one", "command": ["surgery"]}
    return Draft(out, shards, identity, resume=resume, part=part)


def fill(made: Draft) -> None:
    for name in made.remaining("ab"):
        made.sink(name).write(0, name.encode() * 8)
        made.finish(name, {"kept": 1})


@given(sizes=st.lists(st.integers(0, 10**12), max_size=40), count=st.integers(1, 9))
def test_every_file_has_one_part_and_the_parts_are_about_as_large(sizes: list[int], count: int) -> None:
    named = {f"{number}.safetensors": size for number, size in enumerate(sizes)}
    files = [part.files(named) for part in Part(1, count).all]
    assert sorted(name for own in files for name in own) == sorted(named)
    loads = [sum(named[name] for name in own) for own in files]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_last_part_has_to_commit(tmp_path: Path) -> None:
    first, second = Part(1, 2).all
    with draft(tmp_path / "out", first) as one, draft(tmp_path / "out", second) as two:
        assert (one.own, two.own) == (["a.safetensors"], ["b.safetensors"])
        fill(one)
        fill(two)
        assert not one.complete()
        assert one.waiting == [second]
        assert two.complete()
        assert two.done == {"a": {"kept": 1}, "b": {"kept": 1}}
        two.commit({}, {}, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a.safetensors",
        "b.safetensors",
        "out",
        "surgery-report.json",
    ]
    assert (tmp_path / "out/b.safetensors").read_bytes().endswith(b"b" * 8)


def test_nobody_else_writes_a_part_that_is_being_written(tmp_path: Path) -> None:
    part = Part(1, 2)
    with draft(tmp_path / "out", part) as made:
        fill(made)
        for other, says in ((part, "another process writes part 1/2"), (None, "another surgery run is writing it")):
            with pytest.raises(OutputError, match=says), draft(tmp_path / "out", other):
                pass
        assert not made.complete()
    assert (tmp_path / ".out.surgery-draft/a.safetensors").read_bytes().endswith(b"a" * 8)


def test_a_run_by_one_process_takes_over_what_nobody_writes(tmp_path: Path) -> None:
    with draft(tmp_path / "out", Part(1, 2)) as made:
        fill(made)
        made.complete()
    with draft(tmp_path / "out", None) as alone:
        assert not (alone.folder / Part(1, 2).journal).exists()
        fill(alone)
        assert alone.complete()
        alone.commit({}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_to_fail_removes_the_folder(tmp_path: Path) -> None:
    first, second = Part(1, 2).all
    with contextlib.suppress(ZeroDivisionError), draft(tmp_path / "deep/out", first):
        with contextlib.suppress(ZeroDivisionError), draft(tmp_path / "deep/out", second) as made:
            fill(made)
            raise ZeroDivisionError
        assert (tmp_path / "deep/.out.surgery-draft").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_s_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / ".out.surgery-draft").mkdir()
    (tmp_path / ".out.surgery-draft/mine").write_text("mine")
    with pytest.raises(OutputError, match="is no draft of surgery"), draft(tmp_path / "out", Part(1, 2)):
        pass
    assert (tmp_path / ".out.surgery-draft/mine").read_text() == "mine"


@pytest.mark.parametrize("asked", ["0/4", "5/4", "4", "1/0", "a/b", "1/2/3", "-1/4", ""])
def test_what_is_no_part(asked: str) -> None:
    with pytest.raises(OptionError, match="`part` is a number and how many there are, such as 3/16"):
        find_part(asked)


def test_torchrun_says_which_part_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (find_part(None), find_part("1/1"), find_part("3/16")) == (None, None, Part(3, 16))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_part(None) is None, "without a rank, it is another program's"
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert find_part(None) == Part(3, 4)
    with pytest.raises(OptionError, match="under torchrun"):
        find_part("1/4")
