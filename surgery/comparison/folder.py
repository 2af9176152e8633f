"""The folder of a comparison: a page for people, pictures, and everything down to items for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.errors import OutputError
from surgery.paths import OutFile, expanded

PAGE, JSON, CSV, ITEMS = "index.html", "results.json", "results.csv", "items.csv"
KINDS = ("compare", "sweep")


class Folder:
    """A folder to come; what an earlier comparison wrote there is replaced, file by file.

    Raises:
        OutputError: it cannot be made, or holds something else.
        OptionError: matplotlib is missing.
    """

    def __init__(self, path: Path) -> None:
        from surgery.pictures import check_matplotlib

        check_matplotlib("report")
        self.path = expanded(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise OutputError(f"`report` {path}: cannot be made ({error.strerror}). Choose another folder.") from error
        if names and not _ours(self.path / JSON):
            raise OutputError(f"`report` {path}: holds something else. Choose another folder, or an empty one.")
        with OutFile(self.path / JSON, (".json",), "report"):
            pass  # it can be written to, which would else be known after hours

    def write(self, document: dict[str, Any]) -> list[str]:
        """Write everything; returns a sentence for people.

        Raises:
            OutputError: the disk is full, or the folder is gone.
        """
        from surgery.comparison.compare import as_csv, items_as_csv
        from surgery.comparison.page import page
        from surgery.comparison.plot import plots
        from surgery.text import dumps

        files = {JSON: dumps(document), CSV: as_csv(document), ITEMS: items_as_csv(document), PAGE: page(document)}
        for name, content in (files | plots(document)).items():
            with OutFile(self.path / name, (Path(name).suffix,), "report") as file:
                file.write(content)
        return [f"Wrote {self.path / PAGE}"]


def _ours(path: Path) -> bool:
    """Whether a file is the results.json of a comparison: other programs have files of that name."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") in KINDS and "rows" in found
