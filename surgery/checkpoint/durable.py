"""Safe writes: locks, syncs, and an operating system's errors as sentences."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from surgery.errors import OutputError


def lock(file: int, *, seconds: float = 0.0) -> bool:
    """Take an open file for this process alone; False where another one has it, and has it still after so many seconds."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        return True
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return True
        else:
            return True


def unlock(file: int) -> None:
    """Let others take a file that stays open."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def append(file: int, lines: bytes) -> None:
    """Add lines to an open file, and make them durable."""
    left = memoryview(lines)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)


def same_file(file: int, path: Path) -> bool:
    """Return whether an open file is still what the path leads to."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def tried(action: Callable[[], object], sentence: str) -> list[str]:
    """Do what comes after the output has appeared, or beside an error, and must not change how the run ends.

    Returns:
        The sentence, with the reason and the way out, if it failed.
    """
    try:
        action()
    except FileNotFoundError:  # of a removal
        return []
    except BaseException as error:
        return [f"{sentence} ({getattr(error, 'strerror', None) or type(error).__name__}). Remove it by hand."]
    return []


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a folder's names survive a power cut."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn OSError into OutputError."""
    try:
        yield
    except OSError as error:
        raise explain(error, folder) from error


def explain(error: OSError, folder: Path) -> OutputError:
    """An operating system's error while writing, as a sentence with a way out."""
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{folder}: the disk is full. Make room or choose another `out`.")
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{where}: the file system, or a limit (ulimit -f), allows no file as large. Choose another `out`."
        )
    if isinstance(error, PermissionError):
        return OutputError(f"{where}: no permission to write there. Choose another `out`.")
    return OutputError(f"{where}: {error.strerror or error}.")
