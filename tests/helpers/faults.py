"""Runs of commands in which one system call fails, or before which the process is killed or interrupted.

A server (fault_server.py) has surgery imported and forks a child for each run, so that a run takes as long as the command and no
longer. `Faults.run` asks it, and `Bench.judged` judges what the run left: see there what is promised.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError, safe_open

HERE = Path(__file__).parent
DRAFT = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}$")
# What may happen at a call: an errno to fail with; see syscalls.c for the others. Memory runs out at Python's calls.
FAULTS = {
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EMFILE": errno.EMFILE,
    "kill": -9,
    "Ctrl-C": -2,
    "MemoryError": None,
}


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code (negative after a signal, None if it hung), what it said, and how many calls it made."""

    code: int | None
    out: str
    err: str
    calls: int


@dataclass(frozen=True)
class Case:
    """A command to disturb.

    Attributes:
        words: the command, or the name of one of `ACTIONS` and its arguments.
        out: the output's name.
        again: the command that follows a kill or an error and must succeed.
        prepare: makes the inputs, and an earlier output where the command replaces one.
    """

    name: str
    words: tuple[str, ...]
    out: str
    again: tuple[str, ...]
    prepare: Callable[[Path], object] = field(repr=False)


class Faults:
    """The server, and a folder in which the runs take place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "syscalls.so"
        if not library.exists():
            command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "syscalls.c"), "-ldl"]
            subprocess.run(command, check=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}",
            "HF_HUB_OFFLINE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "SURGERY_KERNELS": "numpy",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "helpers.fault_server", str(library)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()

    def run(self, root: Path, words: tuple[str, ...], fault: str = "", at: int = -1) -> Run:
        """Run a command in a folder, with a fault before its at-th call (counted from 1) on files there."""
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([str(root), words, fault, at, str(self.folder)]) + "\n")
        self.server.stdin.flush()
        return Run(*json.loads(self.server.stdout.readline()))


def digests(root: Path) -> dict[str, str]:
    """Every name under a folder with a digest of what it holds; of a report, a task vector's too, without versions of libraries.

    Python's importlib, which knows them, takes a folder that it cannot list for empty.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        found[name] = hashlib.sha256(_content(path)).hexdigest() if path.is_file() else "folder"
    return found


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return _without_versions(content)
    if path.name != "surgery-report.json":
        return content
    try:
        return json.dumps(json.loads(content) | {"versions": None}).encode()
    except ValueError:
        return content


def _without_versions(content: bytes) -> bytes:
    """A safetensors file; a task vector without the versions in the report that its header holds."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        document = json.loads(header["__metadata__"].pop("document"))
        document["report"]["versions"] = None
    except (ValueError, KeyError):
        return content
    return json.dumps([header, document]).encode() + content[end:]


def below(all_of: dict[str, str], name: str) -> dict[str, str]:
    """What of `digests` is a file or folder of this name, and what is in it."""
    return {path: mark for path, mark in all_of.items() if path == name or path.startswith(f"{name}/")}


class Bench:
    """A case, run as it should be once, and then with faults.

    Args:
        folder: empty, for the runs.
    """

    def __init__(self, faults: Faults, case: Case, folder: Path) -> None:
        self.faults, self.case, self.folder = faults, case, folder
        self.fresh = folder / "fresh"
        self.root = folder / "root"
        self.fresh.mkdir(parents=True)
        case.prepare(self.fresh)
        self.before = digests(self.fresh)
        self.calls = self._calls("")
        self.python_calls = self._calls("MemoryError")

    def _calls(self, fault: str) -> int:
        """Run the case without a fault, note what comes of it, and return how many calls could fail."""
        self.reset()
        done = self.faults.run(self.root, self.case.words, fault)
        assert done.code == 0, done
        self.after = digests(self.root)
        assert {name for name in self.after if name not in self.before} <= below(self.after, self.case.out).keys()
        return done.calls

    def reset(self) -> None:
        """Make `root` as it was before the run."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.fresh, self.root)

    def points(self, fault: str, every: int = 1) -> Iterator[int]:
        """The calls at which a fault can be put."""
        yield from range(1, (self.python_calls if fault == "MemoryError" else self.calls) + 1, every)

    def faulty(self, fault: str, at: int) -> str | None:
        """Run the case with a fault, and say what was wrong of what is promised: see `judged`."""
        self.reset()
        wrong = self.judged(self.faults.run(self.root, self.case.words, fault, at), fault)
        return wrong and f"{self.case.name}, {fault} at {at}: {wrong}"

    def judged(self, done: Run, fault: str) -> str | None:
        """Say what was wrong of what is promised about a run in `root` that was disturbed.

        - The inputs are as they were, and so is everything else that is not the output.
        - The output is absent or the old one if the command failed or was killed, and complete if it did not fail.
        - No file that a loader takes is left elsewhere, unless a report beside it says that it is complete.
        - A failure is one sentence or "Stopped."; unless the process was killed nothing is left that is not named.
        - The command given again succeeds, and brings the same bytes.
        """
        left = digests(self.root)
        out, old, new = (below(found, self.case.out) for found in (left, self.before, self.after))
        killed = done.code == -signal.SIGKILL
        wrong = None
        others = {name: mark for name, mark in self.before.items() if name not in old}
        beside = {name: mark for name, mark in left.items() if name not in out and name not in others}
        if any(left.get(name) != mark for name, mark in others.items()):
            wrong = "an input was changed"
        elif done.code is None:
            wrong = "it hung"
        elif done.code == 0 and self._own(out) != new:
            wrong = "it succeeded, and the output is not complete"
        elif done.code != 0 and not killed and out != old:
            wrong = "it failed, and the output is not as before"
        elif killed and out != {} and out != old and self._own(out) != new:
            wrong = "the output is neither absent nor old nor complete"
        elif killed and out == {} and old and not any("surgery-old" in name for name in beside):
            wrong = "the old output is gone"
        elif loadable := self._loadable(beside):
            wrong = f"{loadable} can be loaded"
        elif not killed and (unnamed := self._unnamed(beside, out, done)):
            wrong = f"{unnamed} was left and not named"
        elif not killed and done.code not in (0, 1, 130):
            wrong = f"exit code {done.code}"
        elif done.code == 1 and not (done.err.startswith("error: ") and done.err.count("\n") == 1):
            wrong = f"no single sentence: {done.err[-300:]!r}"
        elif done.code == 130 and (done.err != "Stopped.\n" or fault != "Ctrl-C"):
            wrong = f"stopped, and said {done.err[-300:]!r}"
        if wrong is None and done.code != 0:
            wrong = self._again(appeared=out != {} and out != old)
        return wrong and f"{wrong} ({done.code}: {done.err.strip()[-200:]!r})"

    def _own(self, out: dict[str, str]) -> dict[str, str]:
        """The output without a journal that could not be removed from it."""
        return {name: mark for name, mark in out.items() if not name.endswith("surgery-journal.jsonl")}

    def _loadable(self, names: dict[str, str]) -> str | None:
        for name, mark in names.items():
            path = self.root / name
            if mark == "folder" or path.suffix != ".safetensors" or (path.parent / "surgery-report.json").exists():
                continue
            if ".surgery-train/" in name:  # states of a training are whole models
                continue
            try:
                with safe_open(path, "np"):
                    return name
            except SafetensorError:
                continue
        return None

    def _unnamed(self, beside: dict[str, str], out: dict[str, str], done: Run) -> str | None:
        """What was left behind without a word; after a fault in the removal itself it has to be named."""
        tops = {name.split("/")[0] for name in beside}
        tops |= {name.split("/")[1] for name in out if name not in self.after and "/" in name and done.code == 0}
        said = " ".join((done.out + done.err).split())
        return next((name for name in tops if name not in said.replace(" ", "") and name not in said), None)

    def _again(self, *, appeared: bool) -> str | None:
        force = ("--force",) if appeared and "--force" not in self.case.again else ()
        done = self.faults.run(self.root, (*self.case.again, *force))
        if done.code != 0:
            return f"again it failed: {done.err.strip()[-300:]}"
        found = digests(self.root)
        missing = {name for name, mark in self.after.items() if found.get(name) != mark}
        if missing:
            return f"again it made another {sorted(missing)[0]}"
        # What is kept beside a single file while it is written has a new name each time, and stays after a kill.
        if extra := sorted(name for name in found.keys() - self.after.keys() if not DRAFT.search(name)):
            return f"again it left {extra[0]}"
        return None
