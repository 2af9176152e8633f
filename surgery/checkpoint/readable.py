"""Why a file of a checkpoint cannot be read, as a sentence with a way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    with readable(path):
        raw = path.read_bytes()
    return parse_json(raw, path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in the content of a file; raises CheckpointError, naming the file, where it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not valid JSON. Download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object.")
    return value
