"""Where inputs came from and what ran, and reports as JSON."""

from __future__ import annotations

import functools
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from surgery import __version__
from surgery.checkpoint.source import Checkpoint


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
    found = {"surgery": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "huggingface-hub"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def dumps(report: dict[str, Any]) -> bytes:
    """The report as JSON, the same on standard output and in the file."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path that is no UTF-8 is a lone surrogate here; escaped with a backslash it is JSON again.
    return text.encode(errors="backslashreplace")
