"""The list of an output's files in its report, by which `force` knows what surgery wrote.

Under "files" the report has, for every other file of the output, its size in bytes ("bytes"), and for those beside the weights
the SHA-256 of their content ("sha256"). Only what agrees with the list is ever replaced or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPORT = "surgery-report.json"
JOURNAL = "surgery-journal.jsonl"
WEIGHTS = (".safetensors", ".bin")
MOST_BYTES = 1 << 30  # of a report
WAY_OUT = "Move it away, or choose another `out`."


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Describe every file in a finished folder, but for its report and journal: name with forward slashes -> size and SHA-256."""
    found = dict[str, dict[str, Any]]()
    for name, path in _walk(folder):
        if name in (REPORT, JOURNAL) or path.is_dir():
            continue
        found[name] = {"bytes": path.stat().st_size}
        if not name.endswith(WEIGHTS):
            found[name]["sha256"] = _digest(path)
    return found


def stranger(folder: Path) -> str | None:
    """Say what in a folder is not as surgery wrote it, as the end of a sentence about the folder, and the way out.

    Files of the list that are gone do not matter. Links are never followed.

    Returns:
        None where everything is surgery's; an empty folder is.
    """
    names = sorted(os.listdir(folder))  # noqa: PTH208
    if not names:
        return None
    report = _report(folder)
    if report is None:
        first = next((name for name in names if name != REPORT), REPORT)
        return f"holds {first}, and no {REPORT} that says it is surgery's. {WAY_OUT}"
    listed = report.get("files")
    if not isinstance(listed, dict):
        return f"was written by an older surgery, whose report does not list its files. {WAY_OUT}"
    folders = {parent for name in listed for parent in _parents(name)}
    for name, path in _walk(folder):
        if path.is_dir() and not path.is_symlink():
            if name not in folders:
                return f"holds the folder {name}, which surgery did not write. {WAY_OUT}"
        elif name not in (REPORT, JOURNAL) and name not in listed:
            return f"holds {name}, which surgery did not write. {WAY_OUT}"
        elif name in listed and not _same(path, listed[name]):
            return f"holds {name}, which was changed after surgery wrote it. {WAY_OUT}"
    return None


def remove_output(folder: Path) -> None:
    """Remove an output of surgery: the files of its list that are as listed, and then its folders, where they are empty.

    The report goes last, so that what is left can still be recognised and removed.

    Raises:
        OSError: something cannot be removed, or is left since it is not surgery's.
    """
    report = _report(folder)
    found = (report or {}).get("files")
    listed: dict[str, Any] = found if isinstance(found, dict) else {}
    for name, path in list(_walk(folder)):
        if name == JOURNAL or (name in listed and _same(path, listed[name])):
            path.unlink()
    for _, path in reversed(list(_walk(folder))):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
    if report is not None and os.listdir(folder) == [REPORT]:  # noqa: PTH208
        (folder / REPORT).unlink()
    folder.rmdir()


def _report(folder: Path) -> dict[str, Any] | None:
    """Read the report in a folder; None where there is none, or one that surgery did not write."""
    path = folder / REPORT
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"method", "versions", "tensors"} <= found.keys() else None


def _walk(folder: Path, inside: str = "") -> Iterator[tuple[str, Path]]:
    """Every file, link and folder under a folder, by its name with forward slashes; a folder comes before what is in it."""
    for path in sorted(folder.iterdir()):
        yield f"{inside}{path.name}", path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, f"{inside}{path.name}/")


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])


def _same(path: Path, entry: Any) -> bool:
    """Return whether a file is regular and has the size and the digest of its entry in a list."""
    status = path.lstat()
    if not isinstance(entry, dict) or not stat.S_ISREG(status.st_mode) or status.st_size != entry.get("bytes"):
        return False
    return "sha256" not in entry or _digest(path) == entry["sha256"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
