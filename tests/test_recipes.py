"""The recipes: each is whole, and some run as a person would run them, on tiny models that they make themselves."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "recipes"
RUN: dict[str, Any] = runpy.run_path(str(FOLDER / "run.py"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both scales are the same commands, of other inputs; each row of the paper has a number for each column."""
    recipe = RUN["read"](name)
    both = [RUN["commands"](recipe, scale) for scale in ("paper", "small")]
    assert [[len(words) for words in lines] for lines in both] == [
        [len(words) for words in lines] for lines in both[::-1]
    ]
    fixed = set(shlex.split(re.sub(r"\\\n", " ", re.sub(r"\S*\{\w+\}\S*", " ", recipe["commands"]))))
    for lines in both:
        assert fixed <= {word for words in lines for word in words}
    assert set(re.findall(r"\{(\w+)\}", recipe["commands"])) == recipe["inputs"].keys()
    assert {len(row) for row in recipe["rows"].values()} <= {len(recipe["columns"])}
    assert RUN["main"]([name, "--scale", "paper", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "GB of weights" in out
    assert out.count("\n$ surgery ") == len(both[0])


@pytest.mark.parametrize("name", ["hft-table-7", "mofo-table-4"])
def test_a_recipe_runs_small(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RUN["main"]([name, "--scale", "small", "--out", str(tmp_path / "out")]) == 0
    recipe, out = RUN["read"](name), capsys.readouterr().out
    found = json.loads((tmp_path / "out" / recipe["results"]).read_bytes())
    assert {row["label"] for row in found["rows"]} >= recipe["rows"].keys()
    assert len(found["measures"]) == len(recipe["columns"])
    for numbers in recipe["rows"].values():
        assert all(f"({number})" in out for number in numbers if number is not None)
    # What is there is not made again.
    assert RUN["main"]([name, "--scale", "small", "--out", str(tmp_path / "out")]) == 0
    assert "Wrote" not in capsys.readouterr().out.partition("$ surgery compare")[0]
