"""The notebooks run from top to bottom, on what a demo of a few steps leaves."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from rich.console import Console

from surgery.demo.run import Effort, demo
from surgery.editing.job import prepare
from surgery.editing.run import run

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The demo's folder, where the notebooks look for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surgery.demo.run.SURGERIES", ())
    demo(Path("build/demo"), Console(quiet=True), lambda *_: None, effort=Effort(5, 5, 4))
    return {}


def show(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; its last expression is what a notebook shows."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_first_repairs_a_model(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = [show(cell, names) for cell in cells(NOTEBOOKS[0])]
    assert sum(isinstance(each, matplotlib.figure.Figure) for each in shown) == 4
    assert "FAPM 0.75" in capsys.readouterr().out
    run(prepare("build/demo/pre", "build/demo/ft", names["repaired"].job.method, out=Path("again")))
    for path in Path("again").glob("*.safetensors"):
        assert path.read_bytes() == (Path("build/repaired") / path.name).read_bytes()


def test_the_second_trains_and_repairs(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for cell in cells(NOTEBOOKS[1]):
        show(cell.replace('"max_steps": 100, "batch_size": 64', '"max_steps": 3, "batch_size": 8'), names)
    labels = [row["label"] for row in names["found"].rows]
    assert labels == ["pre", "ft", "MoFO", "HFT", "FAPM 0.75", "HMA 0.3,0.2,0.1", "Half-Reset"]
    assert names["reports"]["mofo"]["totals"]["differ"] < names["reports"]["adamw"]["totals"]["differ"]
    assert "Half-Reset" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for cell in cells(path) for node in ast.walk(ast.parse(cell)) if isinstance(node, kinds)]
