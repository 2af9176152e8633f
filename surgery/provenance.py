"""Record where inputs came from and which versions ran."""

from __future__ import annotations

import functools
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.checkpoint.source import Checkpoint

VERSION = "0.1.0"


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return where a checkpoint came from: what the user typed, and the folder that was read."""
    source = checkpoint.source
    return {
        "typed": source.typed,
        "repo": source.repo,
        "revision": source.revision,
        "folder": str(source.folder.absolute()),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of surgery, Python and installed libraries, without importing them. The result must not be changed."""
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, which `surgery --help` does without

    found = {"surgery": VERSION, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "huggingface-hub"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
