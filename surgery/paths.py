"""Paths as people type them, which may name nothing that could be there."""

from __future__ import annotations

import secrets
from pathlib import Path
from types import TracebackType

from surgery.errors import OutputError


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


class OutFile:
    """A file to come; what stands in its place stays until `write`.

    Args:
        path: where; a file that is there is replaced.
        endings: the endings it may have.
        name: the parameter that it is the value of, for messages.

    Raises:
        OutputError: it has another ending, is a folder, or cannot be created there.
    """

    def __init__(self, path: Path, endings: tuple[str, ...], name: str) -> None:
        self.path, self.name = expanded(path), name
        if self.path.suffix.lower() not in endings:
            raise OutputError(f"`{name}` {path}: the name must end in {' or '.join(endings)}.")
        if self.path.is_dir():
            raise OutputError(f"`{name}` {path}: is a folder. Give the name of a file.")
        # In the same folder, so that the rename cannot fail where this does not.
        self.draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.draft.touch(exist_ok=False)
        except OSError as error:
            raise self._explain(error) from None

    def __enter__(self) -> OutFile:
        return self

    def write(self, content: bytes) -> None:
        """Put the content in place.

        Raises:
            OutputError: the disk is full, or the place is gone.
        """
        try:
            self.draft.write_bytes(content)
            self.draft.replace(self.path)
        except OSError as error:
            raise self._explain(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.draft.unlink(missing_ok=True)

    def _explain(self, error: OSError) -> OutputError:
        return OutputError(f"`{self.name}` {self.path}: cannot be written ({error.strerror}). Choose another place.")
