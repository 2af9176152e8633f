"""Models scored by several processes: together they score each once, and the result is that of one process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import call, is_one_sentence
from helpers.tiny_model import pair_of, questions

from surgery.errors import CheckpointError, OptionError
from surgery.evaluation import spread as module
from surgery.evaluation.scoring import Scoring
from surgery.evaluation.spread import own_device, spread
from surgery.processes import Process, find_process

WORDS = ["--pre", "pre", "--ft", "ft", "--task", "task.jsonl", "--general", "general.jsonl", "--json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pair_of(tmp_path)
    questions(tmp_path / "task.jsonl", 6)
    questions(tmp_path / "general.jsonl", 6, shift=3)
    return tmp_path


def launched(root: Path, *words: str) -> str:
    """What two processes print between them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "surgery"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def told(text: str) -> dict[str, Any]:
    """A comparison, without what differs from run to run."""
    document: dict[str, Any] = json.loads(text)
    return {name: value for name, value in document.items() if name not in ("command", "seconds")}


def test_a_sweep_of_two_processes_is_that_of_one(root: Path) -> None:
    words = ["sweep", *WORDS, "--method", "hma", "--ratios", "0.25:0.75:0.25"]
    several = launched(root, *words, "--cache", "shared")
    code, alone, err = call(*words, cwd=root)
    assert (code, err) == (0, "")
    assert told(several) == told(alone)
    # Of pre, ft and three settings, on two measures.
    assert len([path for path in (root / "shared").iterdir() if b'"values"' in path.read_bytes()]) == 5 * 2


class Bench:
    """Notes what is scored."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def score(self, subject: Any) -> None:
        self.scored.append(subject)
        if subject == "broken":
            raise CheckpointError("It is broken.")


@pytest.mark.parametrize(("rank", "own"), [(0, ["pre", "ft", "d"]), (1, ["pre", "b", "broken"]), (2, ["pre", "c"])])
def test_each_process_scores_its_share(rank: int, own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, waits = Bench(), list[list[str]]()

    @contextlib.contextmanager
    def together() -> Iterator[Callable[[], object]]:
        yield lambda: waits.append(list(bench.scored))

    monkeypatch.setattr(module, "_together", together)
    monkeypatch.setattr(module, "find_process", lambda: Process(rank, 3, rank))
    monkeypatch.setattr(Scoring, "bench", lambda *_: bench)
    scoring = Scoring(cache=Path("shared"))
    subjects: Any = ["pre", "ft", "b", "c", "d", "broken"]
    assert (spread(subjects, [], scoring) is None) == (rank > 0)
    assert bench.scored == own
    assert waits == [["pre"] if rank == 0 else [], own], "pre is there before the others begin"


def test_processes_without_a_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_process", lambda: Process(0, 2, 0))
    with pytest.raises(OptionError, match="give `cache`"):
        spread([], [], Scoring())


def test_a_search_is_for_one_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        assert find_process() is None
        monkeypatch.setenv(name, value)
    assert find_process() == Process(1, 2, 1)
    code, out, err = call("auto", *WORDS, cwd=root)
    assert (code, out) == (1, "")
    assert is_one_sentence(err)
    assert "without torchrun" in err


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device(Process(3, 4, 3), "auto") == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [own_device(Process(rank, 4, rank), "auto") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [own_device(Process(1, 4, 1), asked) for asked in ("cuda", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
