"""A hidden folder beside an output in which a run works, `.NAME.ENDING`: recognised, held by one run, and removed.

A folder with that name may be anybody's. Surgery's own has a file, the marker, whose first line says what it is for:

    {"surgery": ENDING, "output": NAME, …}

A folder or marker that is a link, or a folder without such a marker, is never entered; the run then works in a new folder,
`.NAME.ENDING-` and random digits. Everything in a folder with the marker is surgery's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from surgery.checkpoint.durable import append, lock, tried, unlock
from surgery.errors import OutputError

# What only some systems have: without it, names are opened by their whole path.
BY_FOLDER = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
WEIGHTS = ".safetensors"
JOINING_SECONDS = 60.0  # for which runs that share a folder wait for each other
# What opening a folder or a marker of somebody else's ends with: a link, no folder, gone meanwhile, closed to us, no plain file.
NOT_OURS = {
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENXIO,
}


class Beside:
    """The folder. `take` makes it or takes over what a killed run left, and holds it until `release` or `remove`.

    Args:
        out: the output.
        ending: which kind of folder it is, such as "surgery-draft".
        marker: name of the marker in it.
        shared: several runs work in it, and take it only for moments: it is waited for, and has no other name.
    """

    def __init__(self, out: Path, ending: str, marker: str, *, shared: bool = False) -> None:
        self.out, self.ending, self.name, self.shared = out, ending, marker, shared
        self.folder = out.with_name(f".{out.name}.{ending}")
        self.made: list[Path] = []  # folders above it, the lowest first
        self.new = False
        self.at: int | None = None  # the folder, opened
        self.marker: int | None = None

    def take(self) -> bytes:
        """Make the folder, or take over one that a run of surgery left; returns what its marker holds.

        Raises:
            OutputError: another run works in it.
            OSError: it cannot be made.
        """
        parent, plain = self.out.parent, self.folder
        missing = parent
        while not missing.exists():
            self.made.append(missing)
            missing = missing.parent
        parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            plain.mkdir()
            self.new = True
        others = sorted(path for path in parent.iterdir() if path.name.startswith(f"{plain.name}-"))
        candidates = [plain] if self.shared else [plain, *others]
        for self.folder in candidates:
            found = self._enter()
            if found is not None:
                return found
        if self.shared:
            raise OutputError(
                f"{plain}: is no draft of surgery, and has its name. Move it away, or choose another `out`."
            )
        self.folder = plain.with_name(f"{plain.name}-{secrets.token_hex(4)}")
        self.folder.mkdir()
        self.new = True
        found = self._enter()
        if found is None:
            raise self._busy()
        return found

    def begin(self, **more: Any) -> None:
        """Write the first line of the marker, which tells surgery's own folders, in place of what it holds."""
        assert self.marker is not None
        os.ftruncate(self.marker, 0)
        line = json.dumps({"surgery": self.ending, "output": self.out.name} | more).encode() + b"\n"
        self.append(line)

    def cut(self, size: int) -> None:
        """Drop what a power cut left half-written at the marker's end."""
        assert self.marker is not None
        os.ftruncate(self.marker, size)

    def append(self, lines: bytes) -> None:
        """Add lines to the marker and make them durable."""
        assert self.marker is not None
        append(self.marker, lines)

    def names(self) -> list[str]:
        """The names in the folder."""
        return sorted(os.listdir(self.folder))  # noqa: PTH208

    def read(self, name: str) -> bytes:
        """A file in the folder; nothing where it is not there."""
        try:
            file = self.open(name, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        with os.fdopen(file, "rb") as opened:
            return opened.read()

    def let_others(self) -> None:
        """Let other runs take a shared folder, which stays open."""
        assert self.marker is not None
        unlock(self.marker)

    def take_again(self) -> bool:
        """Take a shared folder once more, as soon as no other run has it; False if it is gone."""
        assert self.marker is not None
        lock(self.marker, seconds=math.inf)
        return self.stands()

    def open(self, name: str, flags: int) -> int:
        """Open a file directly in the folder, never through a link.

        Raises:
            OSError: it cannot be opened, or is no regular file with one name.
        """
        file = self._open(name, flags | SAFE)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(file)
            raise OSError(errno.EEXIST, "is no file of surgery's own", str(self.folder / name))
        return file

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove everything but the marker and the files to keep: weights first, so that a model is unloadable at once."""
        for name in sorted(os.listdir(self.folder), key=lambda name: (not name.endswith(WEIGHTS), name)):  # noqa: PTH208
            path = self.folder / name
            if name == self.name or name in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> list[str]:
        """Remove the folder and everything in it, and the folders that `take` made above it; release it.

        Returns:
            A sentence if something is left.
        """
        sentence = f"{self.folder}: could not be removed"
        held: list[bool] = []
        left = tried(lambda: held.append(self.marker is not None and self.stands()), sentence)
        actions: list[Callable[[], object]] = []
        if held == [True]:
            actions = [self.clear, (self.folder / self.name).unlink, self.folder.rmdir]
        elif self.new:  # made a moment ago, and not yet held
            actions = [(self.folder / self.name).unlink, self.folder.rmdir]
        for action in actions:
            left = tried(action, sentence) or left
        self.release()
        for folder in self.made:
            tried(folder.rmdir, "")
        return left

    def release(self) -> None:
        """Close the folder and its marker, so that another run can take it."""
        for name in ("marker", "at"):
            file = getattr(self, name)
            setattr(self, name, None)
            if file is not None:
                tried(partial(os.close, file), "")

    def _enter(self) -> bytes | None:
        """Open and lock the folder and its marker; returns what that holds, None where the folder is not surgery's."""
        found = None
        try:
            if BY_FOLDER:
                self.at = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | SAFE)
            found = self._marked()
        except OSError as error:
            if error.errno not in NOT_OURS:
                raise
        if found is None:
            self.release()
        return found

    def _marked(self) -> bytes | None:
        """Open and lock the marker; returns what it holds, None where the folder is not surgery's."""
        names = os.listdir(self.folder)  # noqa: PTH208
        if names and self.name not in names:
            return None
        self.marker = self.open(self.name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        held = lock(self.marker, seconds=JOINING_SECONDS if self.shared else 0.0)
        if self.shared:  # what was written while this was waited for
            names = os.listdir(self.folder)  # noqa: PTH208
        found = self._read()
        if found and not self._ours(found):
            return None
        if not found and set(names) - {self.name}:
            return None
        if not held or not self.stands():
            self.new = False
            self.release()
            raise self._busy()
        return found

    def _read(self) -> bytes:
        assert self.marker is not None
        parts, at = [], 0
        os.lseek(self.marker, 0, os.SEEK_SET)
        while part := os.read(self.marker, 1 << 20):
            parts.append(part)
            at += len(part)
            if at == len(part) and not self._ours(part):
                break
        return b"".join(parts)

    def _ours(self, found: bytes) -> bool:
        try:
            line = json.loads(found.split(b"\n", 1)[0])
        except (ValueError, RecursionError):
            return False
        return isinstance(line, dict) and (line.get("surgery"), line.get("output")) == (self.ending, self.out.name)

    def stands(self) -> bool:
        """Return whether the marker is still in the folder, and the folder where it was."""
        assert self.marker is not None
        try:
            if self.at is None:
                status = (self.folder / self.name).lstat()
            else:
                status = os.stat(self.name, dir_fd=self.at, follow_symlinks=False)
                if not os.path.samestat(os.fstat(self.at), self.folder.lstat()):
                    return False
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self.marker), status)

    def _open(self, name: str, flags: int) -> int:
        if self.at is not None:
            return os.open(name, flags, 0o666, dir_fd=self.at)
        return os.open(self.folder / name, flags, 0o666)

    def _busy(self) -> OutputError:
        return OutputError(f"{self.out}: another surgery run is writing it. Wait for it or choose another `out`.")
