"""Paths as people type them, which may name nothing that could be there."""

from __future__ import annotations

from pathlib import Path


def expanded(typed: str | Path) -> Path:
    """The path, with the home folder for `~` and `~name`; as it stands where nobody has that name."""
    try:
        return Path(typed).expanduser()
    except RuntimeError:
        return Path(typed)


def exists(path: Path) -> bool:
    """Whether there is something by that name, which may be too long for one: tasks with commas between them are."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
