"""Where inputs came from, and which versions ran."""

from __future__ import annotations

import functools
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.checkpoint.source import Checkpoint

VERSION = "0.1.0"


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint came from: as typed, and as found."""
    source = checkpoint.source
    return {
        "typed": source.typed,
        "repo": source.repo,
        "revision": source.revision,
        "folder": str(source.folder.absolute()),
    }


@functools.cache
def versions() -> dict[str, str]:
    """What ran: surgery, Python and the libraries that are installed, none of which is imported for this. Not to be changed."""
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, which `surgery --help` does without

    found = {"surgery": VERSION, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "huggingface-hub"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
