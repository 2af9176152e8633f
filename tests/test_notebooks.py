"""The notebooks run from top to bottom, on a tiny pair where the demo would have left one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import tiny_llama_pair

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = tmp_path / "build" / "demo"
    demo.mkdir(parents=True)
    pre, ft = tiny_llama_pair(demo)
    assert (pre, ft) == (demo / "pre", demo / "ft")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert (tmp_path / "build" / "repaired" / "surgery-report.json").exists()
    assert "attention" in capsys.readouterr().out


def test_there_is_one() -> None:
    assert NOTEBOOKS
