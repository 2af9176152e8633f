"""Runs of the command line, and what must hold of every one that is refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.__main__ import main

SURGERY = [sys.executable, "-m", "surgery"]
# The command, taking its time: on a busy machine too it is at work when a test disturbs it.
SLOW = [sys.executable, str(Path(__file__).parent / "slow_surgery.py")]


def surgery(
    *words: str, cwd: Path, command: Sequence[str] = SURGERY, env: Mapping[str, str] | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `surgery` as a process of its own, in a folder, with more variables in its environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {**(env or {}), **more}
    return subprocess.run([*command, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def contents(folder: Path) -> dict[str, str]:
    """Every name under a folder, hidden ones too, with a digest of what it holds."""
    return {path.relative_to(folder).as_posix(): _digest(path) for path in folder.rglob("*")}


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return "no file" if not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.endswith(".\n") and text.count("\n") == 1


def call(*words: str, cwd: Path) -> tuple[int, str, str]:
    """What `surgery` would return and print in a folder. In this process, which is faster; a traceback would fail the test."""
    home, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(words), out.getvalue(), err.getvalue()
    finally:
        os.chdir(home)


def refused(root: Path, *words: str, says: tuple[str, ...]) -> None:
    """Run `surgery` where it must refuse: exit 1, one sentence that says `says`, and everything under `root` as before."""
    before = contents(root)
    code, out, err = call(*words, cwd=root)
    assert (code, out) == (1, ""), err
    assert is_one_sentence(err), err
    for part in says:
        assert part in err, err
    assert contents(root) == before


def run(*words: object) -> int:
    """The exit code of `surgery` in this process."""
    return main([str(word) for word in words])
