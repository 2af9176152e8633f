"""Open the files of a checkpoint: regular files only, of a size that can be, and what goes wrong as a sentence with a way out."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from surgery.errors import CheckpointError

MAX_WHOLE = 1 << 29  # bytes of a configuration, an index, a tokenizer


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while a file is opened and read into CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Download or save the checkpoint again.") from None
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it. Change its mode or run as its owner.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def open_file(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file for reading. A pipe, a device or a socket, which would hang or never end, is refused at once.

    Args:
        buffering: as for `open`.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is no regular file.
    """
    # Without waiting for the other end of a pipe, and without making a terminal ours.
    file = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        mode = os.fstat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                f"{path}: is no regular file but a pipe or a device, which surgery never reads. Replace it."
            )
        return os.fdopen(file, "rb", buffering=buffering)
    except BaseException:
        os.close(file)
        raise


def read_whole(path: Path, *, most: int = MAX_WHOLE) -> bytes:
    """All bytes of a small file.

    Args:
        most: bytes that it may have.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or is larger.
    """
    with readable(path), open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise CheckpointError(f"{path}: has more than {most:,} bytes, which no such file has. Replace it.")
        return file.read(most + 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    return parse_json(read_whole(path), path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in the content of a file; raises CheckpointError, naming the file, where it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not valid JSON. Download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object.")
    return value
