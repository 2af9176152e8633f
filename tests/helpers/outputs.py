"""Folders as surgery would have written them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from surgery.checkpoint.listing import REPORT


def as_output(folder: Path) -> Path:
    """Give a folder a report that lists every file in it, by which surgery takes it for an output of its own."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size}
        | ({} if path.suffix == ".safetensors" else {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
        for path in folder.rglob("*")
        if path.is_file() and path.name != REPORT
    }
    (folder / REPORT).write_text(json.dumps({"method": "fapm", "versions": {}, "tensors": [], "files": files}))
    return folder
