"""The small JSON files of a checkpoint: config, index, params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Download or save the checkpoint again.") from None
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it. Change its mode or run as its owner.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not valid JSON. Download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: should hold a JSON object.")
    return value
