"""Why a file of a checkpoint cannot be read, as a sentence with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import CheckpointError


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
