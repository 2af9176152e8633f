"""Scores kept in a folder that the user names, so that adding a model to a comparison evaluates only that one.

A file is named after the SHA-256 of all that the scores depend on: the weights, what lies beside them, the measure, what they are
computed in and with. It is written when a measure is done, so that a run that was stopped has lost little.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import OutputError
from surgery.evaluation.scores import Scores
from surgery.paths import Kind, OutFile, apart

FORMAT = 1
BEGIN = b'{"key": {'


def _kept(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN


SCORES = Kind("file of scores", (".json",), _kept)


class Cache:
    """The folder.

    Args:
        folder: made where there is none; None to keep nothing.

        inputs: files and folders that are read, and must not be written to.

    Raises:
        OutputError: it cannot be made or written to, or lies in an input.
    """

    def __init__(self, folder: str | Path | None, inputs: Iterable[Path] = ()) -> None:
        self.folder = apart(Path(folder), inputs, "cache", replaced=False) if folder else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"`cache` {folder}: cannot be made ({error.strerror}). Choose another folder."
                ) from error
            with OutFile(self.folder / f"{secrets.token_hex(32)}.json", SCORES, "cache"):
                pass  # it can be written to, which would else be known after hours

    def find(self, key: dict[str, Any]) -> Scores | None:
        """The scores that were kept under a key; None where there are none, or their file is damaged."""
        path = self._path(key)
        if path is None:
            return None
        try:
            found = json.loads(path.read_bytes())
            if found["key"] != _plain(key):
                return None
            values, weights = (np.array(found[name], np.float64) for name in ("values", "weights"))
            if values.ndim != 1 or values.shape != weights.shape or not len(values):
                return None
            return Scores(found["kind"], values, weights, found["items"], found["extra"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: dict[str, Any], scores: Scores) -> None:
        """Keep scores under a key.

        Raises:
            OutputError: the disk is full, or the folder is gone.
        """
        path = self._path(key)
        if path is None:
            return
        content = {
            "key": _plain(key),
            "kind": scores.kind,
            "values": scores.values.tolist(),
            "weights": scores.weights.tolist(),
            "items": list(scores.items),
            "extra": scores.extra,
        }
        with OutFile(path, SCORES, "cache") as file:
            file.write(json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace"))

    def find_fingerprint(self, key: dict[str, Any]) -> str | None:
        """The fingerprint of weights that was kept under a key, which says how they are made; None where there is none."""
        path = self._path(key)
        try:
            found = json.loads(path.read_bytes()) if path else {}
        except (OSError, ValueError):
            return None
        text = found.get("fingerprint") if isinstance(found, dict) and found.get("key") == _plain(key) else None
        return text if isinstance(text, str) else None

    def keep_fingerprint(self, key: dict[str, Any], fingerprint: str) -> None:
        """Keep the fingerprint of weights under a key.

        Raises:
            OutputError: the disk is full, or the folder is gone.
        """
        path = self._path(key)
        if path is not None:
            with OutFile(path, SCORES, "cache") as file:
                file.write(json.dumps({"key": _plain(key), "fingerprint": fingerprint}).encode())

    def _path(self, key: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps({"format": FORMAT, **_plain(key)}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain
