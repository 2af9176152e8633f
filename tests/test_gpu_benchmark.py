"""The GPU benchmark, small, on the processor: every part finds what it promises, and one that fails does not stop the others."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.__main__ import PARTS, build_kernels
from benchmarks.gpu.record import Record
from surgery.native import Native

ROOT = Path(__file__).parents[1]
# A line that each part must have, and a number.
FOUND = {
    "exact": ("MoFO and the literal reference", "fapm"),
    "edits": ("a command on a tiny pair", "seconds"),
    "mofo": ("MoFO, float32, 28.8k", "MoFO, stochastic, bfloat16"),
    "hft": ("frozen 50.0%", "0.000 "),
    "score": ("taking the weights of fapm of the pair", "generated answers"),
}


@pytest.mark.parametrize("part", FOUND)
def test_a_part(part: str, tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json", tmp_path, True, time.monotonic() + 60)
    importlib.import_module(f"benchmarks.gpu.{part}").run(record)
    found = json.loads((tmp_path / "part.json").read_text())
    line, number = FOUND[part]
    assert line in {what for what, _, _ in found["lines"]}
    assert found["data"][number]
    if part == "exact":
        assert [what for what, result, _ in found["lines"] if not result.startswith("0 of ")] == []


def test_a_part_that_fails_is_recorded_and_the_next_one_begins(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--small", "--only", "exact", "mofo"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # without tests/, where the literal reference is
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(PARTS) == ["exact", "tests", "edits", "mofo", "hft", "score"]
    assert parts["exact"]["state"] == "failed: ModuleNotFoundError: No module named 'helpers'"
    assert parts["mofo"]["state"] == "done"
    assert "MoFO, float32, 28.8k" in done.stdout.rpartition("s in all")[2]


def test_the_script_runs(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "--small", "--only", "tests"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert " skipped" in done.stdout.splitlines()[-1] or " passed" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_kernels_are_compiled_where_they_are_not_there_yet(tmp_path: Path) -> None:
    source = shutil.copy(ROOT / "surgery" / "kernels.c", tmp_path)
    assert build_kernels(Path(source)) == "compiled"
    (built,) = tmp_path.glob("_kernels*")
    assert Native(built).library.abs_sum(2, np.ones(3, np.float32).ctypes.data, 3) == 3.0
    assert build_kernels(Path(source)) == "were there"
