"""An edit by several processes: byte for byte what one makes, also when some of them are killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.checkpoints import fine_tuned, tiny_llama, write_checkpoint
from helpers.command import SLOW, SURGERY, call, contents, is_one_sentence
from safetensors import SafetensorError, safe_open

PARTS = 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
WORDS = ["fapm", "--pre", "pre", "--ft", "ft", "--out", "out", "--workers", "1", "--sparsity", "0.8"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in six files, what one process makes of it, and beside it a file to copy."""
    root = tmp_path_factory.mktemp("parts")
    pre = tiny_llama(layers=4, width=64)
    write_checkpoint(root / "pre", pre, shards=6)
    write_checkpoint(root / "ft", fine_tuned(pre), shards=6)
    (root / "ft/tokenizer.json").write_text("{}")
    here(root, *WORDS)
    (root / "out").rename(root / "expected")
    return root


@pytest.fixture
def root(pair: Path) -> Iterator[Path]:
    yield pair
    for path in pair.iterdir():
        if path.name not in ("pre", "ft", "expected"):
            shutil.rmtree(path)


def start(root: Path, part: int, *more: str, kill: str | None = None) -> subprocess.Popen[str]:
    """One process of the job, which kills itself where it is told to: see `helpers.slow_surgery`."""
    command = [*(SLOW if kill else SURGERY), *WORDS, "--part", f"{part}/{PARTS}", *more]
    environment = ENVIRONMENT | ({"SURGERY_KILL": kill} if kill else {})
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def here(root: Path, *words: str) -> str:
    """Run a command in this process, which is faster; what it prints."""
    with patch.object(sys, "argv", ["surgery", *words]):  # which the report has
        code, out, err = call(*words, cwd=root)
    assert (code, err) == (0, ""), err
    return out


def alone(root: Path, part: int, *more: str) -> str:
    """A part by itself, one after another."""
    return here(root, *WORDS, "--part", f"{part}/{PARTS}", *more)


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out


def assert_expected(root: Path) -> None:
    assert contents(root / "out") == contents(root / "expected")
    assert sorted(path.name for path in root.iterdir()) == ["expected", "ft", "out", "pre"]


def assert_not_there(root: Path) -> None:
    """No output, and no file that a loader takes."""
    assert not (root / "out").exists()
    for path in (root / ".out.surgery-draft").glob("*.safetensors"):
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass


def test_torchrun(root: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PARTS), "--standalone"]
    command = [*launcher, "-m", "surgery", *WORDS]
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    assert done.stdout.count(" is done.") == PARTS - 1
    assert_expected(root)


def test_all_at_once_and_one_of_them_killed(root: Path) -> None:
    processes = [start(root, part, kill="2,0" if part == 2 else None) for part in range(1, PARTS + 1)]
    assert processes[1].wait() == -signal.SIGKILL
    said = [ended(process) for process in (processes[0], *processes[2:])]
    assert all("outstanding: " in text and " is done." in text for text in said)
    assert any(text.rstrip().endswith("outstanding: 2.") for text in said)
    assert_not_there(root)
    assert "Wrote " in alone(root, 2, "--resume")
    assert_expected(root)


def test_one_after_another_and_killed_in_the_last_moment(root: Path) -> None:
    for part in (3, 1, 4):
        alone(root, part)
        assert_not_there(root)
    killed = start(root, 2, kill="1000,0")  # just before the output would appear
    assert killed.wait() == -signal.SIGKILL
    assert not (root / "out").exists()
    assert "Wrote " in alone(root, 1, "--resume")
    assert_expected(root)


def test_a_part_that_was_begun_starts_afresh_and_leaves_the_others_alone(root: Path) -> None:
    alone(root, 1)
    before = contents(root / ".out.surgery-draft")
    alone(root, 1)
    assert contents(root / ".out.surgery-draft").keys() == before.keys()
    report = [json.loads(alone(root, part, "--json")) for part in (2, 3, 4)]
    assert [left["outstanding"] for left in report[:2]] == [[3, 4], [4]]
    assert report[2] == json.loads((root / "expected/surgery-report.json").read_text())
    assert_expected(root)


def test_another_run_s_parts_are_not_taken(root: Path) -> None:
    alone(root, 1)
    words = [*WORDS[:-1], "0.5", "--part", f"2/{PARTS}", "--resume"]
    code, _, err = call(*words, cwd=root)
    assert code == 1
    assert is_one_sentence(err)
    assert "differs in options" in err
    for part in (2, 3, 4):
        alone(root, part)
    assert_expected(root)


def test_what_one_process_cannot_edit_stops_it_alone(root: Path, tmp_path: Path) -> None:
    """Its own files are removed; the others', of no use any more, with the last of them."""
    pre = tiny_llama()
    pre["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "pre", pre, shards=2)
    write_checkpoint(tmp_path / "ft", fine_tuned(tiny_llama()), shards=2)
    codes = {}
    for part in (1, 2):
        codes[part], _, _ = call(*WORDS, "--part", f"{part}/2", cwd=tmp_path)
    (bad,) = [part for part, code in codes.items() if code == 1]
    assert codes[3 - bad] == 0
    left = contents(tmp_path / ".out.surgery-draft")
    assert f"surgery-journal-{3 - bad}-of-2.jsonl" in left
    assert len([name for name in left if name.endswith(".safetensors")]) == 1
    assert not (tmp_path / "out").exists()
