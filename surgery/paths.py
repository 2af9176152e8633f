"""Paths as people type them, and where a file may be written.

Every place that surgery writes to goes through `apart`: never an input, nor anything in one. A file that is there is replaced
only if a mark inside says that surgery wrote it: see `Kind`.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from surgery.errors import OutputError, SurgeryError
from surgery.interrupt import postponed, uninterrupted


def expanded(typed: str | Path) -> Path:
    """Return the path, with the home folder for `~` and `~name`; as it stands where nobody has that name."""
    try:
        return Path(typed).expanduser()
    except RuntimeError:
        return Path(typed)


def exists(path: Path) -> bool:
    """Return whether there is something by that name, which may be too long for one: tasks with commas between them are."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def local(*typed: str | Path | None) -> list[Path]:
    """Return those of the names that are files or folders here; others may be ids of a hub."""
    return [path for name in typed if name is not None and exists(path := expanded(name))]


def apart(path: Path, inputs: Iterable[Path], name: str, *, replaced: bool = True) -> Path:
    """Return the real path of an output, if no input can be harmed by writing it.

    Args:
        path: a file or folder to write, which need not exist.
        inputs: files and folders that are read; the files that lie in such a folder are inputs too.
        name: the parameter that names the output, for messages.
        replaced: what is at the path gives way to the output; False for a folder to which files are added, which may contain
            inputs.

    Raises:
        OutputError: it is an input, lies in one, is another name (a hard link) of one, or contains one and will be replaced.
    """
    try:
        real = Path(os.path.realpath(path.expanduser()))
    except RuntimeError:
        raise OutputError(f"{path}: there is no such user. Choose another `{name}`.") from None
    taken = _identity(real)
    for given in inputs:
        other = Path(os.path.realpath(given))
        if real == other or other in real.parents:
            raise OutputError(
                f"{path}: is inside the input {given}, which is never written to. Choose another `{name}`."
            )
        if replaced and real in other.parents:
            raise OutputError(f"{path}: contains the input {given}. Choose another `{name}`.")
        if taken is None:
            continue
        for file in [other, *_entries(other)]:
            if _identity(file) == taken:
                raise OutputError(
                    f"{path}: is another name of the input {file}, which is never written to. Choose another `{name}`."
                )
    return real


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells one file from every other, whatever its names are; None where there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@dataclass(frozen=True)
class Kind:
    """A kind of file that surgery writes.

    Attributes:
        name: for messages, such as "a picture".
        endings: that its name may have.
        ours: whether a regular file is one of this kind that surgery wrote, by a mark inside.
    """

    name: str
    endings: tuple[str, ...]
    ours: Callable[[Path], bool]


class OutFile:
    """A file to come. What stands in its place stays until `write`, and is replaced only if surgery wrote it.

    Args:
        path: where; where a link leads to.
        kind: what will be in it.
        name: the parameter that it is the value of, for messages.
        inputs: files and folders that are read, and must not be written to.

    Raises:
        OutputError: it has another ending, is a folder, belongs to an input, is something that surgery did not write, or cannot
            be created there.
    """

    def __init__(self, path: Path, kind: Kind, name: str, inputs: Iterable[Path] = ()) -> None:
        self.typed, self.kind, self.name = path, kind, name
        if path.suffix.lower() not in kind.endings:
            raise OutputError(f"`{name}` {path}: the name must end in {' or '.join(kind.endings)}.")
        self.path = apart(path, inputs, name)
        self._check()
        # In the same folder, so that the rename cannot fail where this does not.
        self.draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        self.written = False

    def keep_off(self, inputs: Iterable[Path]) -> None:
        """Check once more against inputs that became known only now: a hub's files.

        Raises:
            OutputError: the file belongs to one of them.
        """
        apart(self.path, inputs, self.name)

    def __enter__(self) -> OutFile:
        try:
            with postponed():
                os.close(os.open(self.draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise self._explain(error) from None
            raise
        return self

    def write(self, content: bytes) -> None:
        """Put the content in place, whole or not at all.

        Raises:
            OutputError: the disk is full, the place is gone, or something else is there now.
        """
        self._check()
        try:
            file = os.open(self.draft, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_BINARY", 0))
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            finally:
                os.close(file)
            with uninterrupted():
                self.draft.replace(self.path)
                self.written = True
        except OSError as error:
            raise self._explain(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.written:
            return
        left = self._remove()
        if left and error is None:
            raise left
        if left and isinstance(error, SurgeryError):
            error.args = (f"{error} {self.draft} is left: remove it.",)

    def _remove(self) -> OutputError | None:
        """Remove the draft; return why it could not be."""
        try:
            with uninterrupted():
                self.draft.unlink(missing_ok=True)
        except Exception as error:  # memory may be gone too
            return self._explain(error)
        return None

    def _check(self) -> None:
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._explain(error) from None
        if stat.S_ISDIR(found.st_mode):
            raise OutputError(f"`{self.name}` {self.typed}: is a folder. Give the name of a file.")
        if stat.S_ISREG(found.st_mode) and (found.st_size == 0 or self.kind.ours(self.path)):
            return
        raise OutputError(
            f"`{self.name}` {self.typed}: is there already, and is no {self.kind.name} that surgery wrote, so that it is not "
            "replaced. Move it away, or choose another name."
        )

    def _explain(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return OutputError(f"`{self.name}` {self.typed}: cannot be written ({reason}). Choose another place.")
