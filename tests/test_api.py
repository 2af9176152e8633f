"""The Python interface gives what the commands give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import pair_of, questions

import surgery
from surgery.__main__ import main
from surgery.errors import CheckpointError, OptionError
from surgery.methods import Fapm


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    pre, ft = pair_of(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{n % 80}" for n in range(300)))
    return {"pre": pre, "ft": ft, "task": questions(tmp_path / "task.jsonl", 12), "text": tmp_path / "text.txt"}


def test_edit_writes_what_the_command_writes(data: dict[str, Path], tmp_path: Path) -> None:
    pair = surgery.open_pair(data["pre"], data["ft"])
    edited = surgery.edit(pair, "hma", ratios=(0.3, 0.1), out=tmp_path / "api")
    typed = ["hma", "--pre", str(data["pre"]), "--ft", str(data["ft"]), "--ratios", "0.3,0.1"]
    assert main([*typed, "--out", str(tmp_path / "command")]) == 0
    names = [path.name for path in (tmp_path / "command").iterdir() if path.suffix == ".safetensors"]
    for name in names:
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert edited.report == json.loads((tmp_path / "api" / "surgery-report.json").read_text())


def test_an_edit_scores_the_same_in_memory_and_on_disk(data: dict[str, Path], tmp_path: Path) -> None:
    pair = surgery.open_pair(data["pre"], data["ft"])
    edited = surgery.edit(pair, Fapm(0.5))
    surgery.edit(pair, "fapm", sparsity=0.5, out=tmp_path / "written")
    measures = [f"{data['task']}:loss", str(data["text"])]
    memory = surgery.evaluate(edited, measures, seq_len=32)
    disk = surgery.evaluate(tmp_path / "written", measures, seq_len=32)
    assert {name: scores.value for name, scores in memory.items()} == {name: disk[name].value for name in disk}
    found = surgery.compare(
        pair,
        {"memory": edited, "disk": tmp_path / "written"},
        task=measures[:1],
        general=measures[1:],
        seq_len=32,
    )
    one, other = (row for row in found.rows if row["role"] == "other")
    same = ("fingerprint", "retention", "forgetting", "scores", "method")
    assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert one["distance"] == pytest.approx(other["distance"], rel=1e-6)
    assert "memory" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert "<table" in found._repr_html_()
    assert found.write(tmp_path / "report").read_bytes().startswith(b"<!doctype html>")


def test_what_cannot_be_meant_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    pair = surgery.open_pair(data["pre"], data["ft"])
    with pytest.raises(OptionError, match="There is no method fap"):
        surgery.edit(pair, "fap")
    with pytest.raises(OptionError, match=r"fapm: .*unexpected keyword argument 'sparse'"):
        surgery.edit(pair, "fapm", sparse=0.5)
    with pytest.raises(OptionError, match="has its parameters already"):
        surgery.edit(pair, Fapm(0.5), sparsity=0.5)
    with pytest.raises(OptionError, match="Two rows are named ft"):
        surgery.compare(pair, [data["ft"]], task=[str(data["task"])], general=[str(data["text"])])
    delta = tmp_path / "delta.safetensors"
    typed = ["extract", "--method", "fapm", "--pre", str(data["pre"]), "--ft", str(data["ft"]), "--out", str(delta)]
    assert main(typed) == 0
    with pytest.raises(CheckpointError, match="nothing without its base"):
        surgery.evaluate(delta, [str(data["text"])])
    assert surgery.evaluate(delta, [str(data["text"])], pre=data["pre"], seq_len=32)


def test_one_word_a_path_and_a_list_mean_the_same(data: dict[str, Path]) -> None:
    pair = surgery.open_pair(data["pre"], data["ft"])
    options: dict[str, Any] = {"seq_len": 32}
    numbered: Any = {0.5: surgery.edit(pair, "fapm", sparsity=0.5)}
    typed, text = str(data["text"]), data["text"]
    wanted = surgery.evaluate(data["ft"], [typed], **options)["text"].value
    for measures in (typed, text, [text]):
        assert surgery.evaluate(data["ft"], measures, **options)["text"].value == wanted
    one = surgery.compare(pair, numbered[0.5], task=data["task"], general=text, **options)
    named = surgery.compare(pair, numbered, task=[data["task"]], general=[typed], **options)
    assert [row["label"] for row in named.rows] == ["pre", "ft", "0.5"]
    assert one.rows[2]["scores"] == named.rows[2]["scores"]
    again = surgery.compare(pair, {"again": data["ft"]}, task=[str(data["task"])], general=typed, **options)
    assert again.rows[2]["fingerprint"] == again.rows[1]["fingerprint"]


def test_importing_surgery_imports_no_heavy_library() -> None:
    program = "import sys, surgery; print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
