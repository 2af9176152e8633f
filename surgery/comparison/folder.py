"""The folder of a comparison: a page for people, pictures, and everything down to items for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from surgery.errors import OutputError
from surgery.paths import Kind, OutFile, apart
from surgery.pictures import PICTURE

PAGE, JSON, CSV, ITEMS = "index.html", "results.json", "results.csv", "items.csv"
COMPARISONS = ("compare", "sweep", "auto")
PICTURES = re.compile(r"(pareto|skills|curves|race)\.(svg|png)")


class Folder:
    """A folder to come. What an earlier comparison wrote there is replaced, file by file; other files stay.

    Args:
        path: new, empty, or of an earlier comparison.
        inputs: files and folders that are read, and must not be written to.

    Raises:
        OutputError: it cannot be made, belongs to an input, or holds something else.
        OptionError: matplotlib is missing.
    """

    def __init__(self, path: Path, inputs: Iterable[Path] = ()) -> None:
        from surgery.pictures import check_matplotlib

        check_matplotlib("report")
        self.path, self.inputs = apart(path, inputs, "report", replaced=False), list(inputs)
        try:
            names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        except OSError as error:
            raise self._explain(path, error) from error
        if names and not ((self.path / JSON).is_file() and _results(self.path / JSON)):
            raise OutputError(f"`report` {path}: holds something else. Choose another folder, or an empty one.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._explain(path, error) from error
        for name in (*KINDS, *sorted(filter(PICTURES.fullmatch, names))):
            with self._file(name):
                pass  # it can be written, which would else be known after hours

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
            with self._file(name) as file:
                file.write(content)
        return [f"Wrote {self.path / PAGE}"]

    def _file(self, name: str) -> OutFile:
        return OutFile(self.path / name, KINDS.get(name, PICTURE), "report", self.inputs)

    @staticmethod
    def _explain(path: Path, error: OSError) -> OutputError:
        return OutputError(f"`report` {path}: cannot be made ({error.strerror}). Choose another folder.")


def _results(path: Path) -> bool:
    """Whether a file is the results.json of a comparison: other programs have files of that name."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") in COMPARISONS and "rows" in found


def _with(mark: bytes) -> Callable[[Path], bool]:
    """Whether a file has a mark near its beginning."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            return mark in file.read(4096)

    return ours


KINDS = {
    JSON: Kind("file of results", (".json",), _results),
    CSV: Kind("table", (".csv",), _with(b"label,checkpoint,method,fingerprint,downstream,retention,")),
    ITEMS: Kind("table", (".csv",), _with(b"measure,item,label,value,weight\n")),
    PAGE: Kind("page", (".html",), _with(b'<meta name="generator" content="model-surgery">')),
}
