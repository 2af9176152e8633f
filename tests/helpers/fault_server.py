"""The process in which disturbed commands run: it has surgery imported, and forks a child for each request of `helpers.faults`.

    LD_PRELOAD=syscalls.so python -m helpers.fault_server syscalls.so

A request is a line of JSON on standard input: the folder, the command, the fault, the number of the call, and a folder for what
is printed. The answer is one on standard output: exit code, standard output, standard error, and how many calls there were.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.faults import FAULTS

SECONDS = 60
# Those of `os` and the file objects of Python that MemoryError is raised from.
CALLS = (
    "open",
    "close",
    "write",
    "pwrite",
    "fsync",
    "ftruncate",
    "mkdir",
    "rename",
    "replace",
    "link",
    "unlink",
    "rmdir",
)
MORE_CALLS = ("listdir", "scandir", "lstat", "stat", "fstat", "preadv", "read")


class _Count:
    """Raises MemoryError at the at-th call of `os`."""

    def __init__(self, root: str, at: int) -> None:
        self.root, self.at, self.count = root, at, 0
        for name in (*CALLS, *MORE_CALLS):
            setattr(os, name, self._counted(getattr(os, name)))
        sys.addaudithook(self._audit)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._point()
            return call(*arguments, **options)

        return counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(self.root):
            self._point()

    def _point(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise MemoryError


def _child(library: Any, request: list[Any], answer: int) -> None:
    root, words, fault, at, scratch = request
    os.chdir(root)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{scratch}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from surgery.__main__ import main

    act = ACTIONS.get(words[0])
    counter = None
    if fault == "MemoryError":
        counter = _Count(root, at)
    else:
        library.faults_arm(root.encode(), at, FAULTS.get(fault, 0))
    code = 3
    try:
        code = act(words) if act else main(words)
    except BaseException:
        traceback.print_exc()
    library.faults_disarm()
    count = counter.count if counter else library.faults_count()
    sys.stdout.flush()
    sys.stderr.flush()
    _write(answer, f"{count} {code}".encode())
    os._exit(0)


# Before `_Count` changes them.
_write, _read, _close = os.write, os.read, os.close


def serve(library: Any) -> None:
    """Answer requests until standard input ends."""
    import numpy  # noqa: F401
    import rich.progress  # noqa: F401

    import surgery.commands
    import surgery.editing.apply
    import surgery.editing.display
    import surgery.editing.extract
    import surgery.editing.run
    import surgery.train.work  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        begin, end = os.pipe()
        child = os.fork()
        if child == 0:
            _child(library, request, end)
        _close(end)
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.kill(child, signal.SIGUSR1))
        signal.alarm(SECONDS)
        _, status = os.waitpid(child, 0)
        signal.alarm(0)
        said = _read(begin, 100).split()
        _close(begin)
        calls, code = map(int, said) if said else (0, 0)
        if os.WIFSIGNALED(status):
            code = -os.WTERMSIG(status)
        out, err = (Path(request[4], name).read_text(errors="replace") for name in ("out", "err"))
        print(json.dumps([None if code == -signal.SIGUSR1 else code, out, err, calls]), flush=True)


def _fails(act: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
    """A function of the library as a command: its errors are told as `surgery` tells them."""

    def action(words: list[str]) -> int:
        from surgery.errors import SurgeryError

        try:
            act(words)
        except SurgeryError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except MemoryError:
            print("error: Not enough memory.", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return 130
        return 0

    return action


def _train(words: list[str]) -> None:
    """What a training does with files, without one."""
    from surgery.checkpoint.listing import listing
    from surgery.train.work import Work

    with Work(Path(words[1]).resolve(), {"optim": "mofo"}, resume=False, replace="--force" in words) as work:
        work.result.mkdir(parents=True, exist_ok=True)
        shutil.copyfile("ft/model.safetensors", work.result / "model.safetensors")
        shutil.copyfile("ft/config.json", work.result / "config.json")
        report = {"method": "train", "versions": {}, "tensors": [], "files": listing(work.result)}
        (work.result / "surgery-report.json").write_text(json.dumps(report))
        work.finish()
    print(*work.left)


def _norms(words: list[str]) -> None:
    import numpy as np

    from surgery.calibrate.cache import save
    from surgery.methods.wanda import Norm

    save(Path(words[1]), {"a": Norm(np.ones(3, np.float32), False, 7)}, {"weights": words[2]})


def _scores(words: list[str]) -> None:
    import numpy as np

    from surgery.evaluation.cache import Cache
    from surgery.evaluation.scores import Scores

    cache = Cache(words[1])
    if cache.find({"weights": "x"}) is None:
        cache.keep({"weights": "x"}, Scores("share", np.ones(3), np.ones(3), [{"prompt": "a"}] * 3, {}))


ACTIONS = {"train-writer": _fails(_train), "norms": _fails(_norms), "scores": _fails(_scores)}


if __name__ == "__main__":
    loaded = ctypes.CDLL(sys.argv[1])
    loaded.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    loaded.faults_count.restype = ctypes.c_long
    serve(loaded)
