"""The small JSON files of a checkpoint: config, index, params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.checkpoint.readable import readable
from surgery.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    with readable(path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not valid JSON. Download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object.")
    return value
