"""Training data as records with fields: JSON Lines, a JSON list, Parquet, or a data set on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import HubError, OptionError

ENDINGS = (".jsonl", ".json", ".parquet")


def local(data: str) -> Path | None:
    """The file that `data` names; None where it must be a data set on the hub.

    Raises:
        OptionError: it is a folder, a file of another kind, or looks like a file that does not exist.
    """
    path = Path(data).expanduser()
    ending = path.suffix.lower()
    if path.is_dir():
        raise OptionError(f"{data}: is a folder. Give a {', '.join(ENDINGS)} file, or a data set on the hub.")
    if path.exists() and ending not in ENDINGS:
        raise OptionError(f"{data}: training data is read from {', '.join(ENDINGS)}. Rename or convert it.")
    if not path.exists() and (ending in ENDINGS or path.is_absolute()):
        raise OptionError(f"{data}: no such file. Check the path.")
    return path if path.exists() else None


def records(data: str) -> Iterator[tuple[str, Any]]:
    """The records of a file, or of the "train" split of a data set on the hub, each with where it stands.

    Args:
        data: a path, or `name` or `name:subset` on the hub.

    Raises:
        OptionError: it cannot be read.
        HubError: it cannot be fetched.
    """
    path = local(data)
    if path is None:
        yield from _hub(data)
        return
    try:
        yield from _parquet(path) if path.suffix.lower() == ".parquet" else _json(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        while (start := file.read(1)).isspace():
            pass
        file.seek(0)
        if start == "[":
            for number, record in enumerate(_parse(file.read(), f"{path}: is not JSON")):
                yield f"{path}, record {number + 1}", record
            return
        for number, line in enumerate(file):
            if line.strip():
                yield f"{path}, line {number + 1}", _parse(line, f"{path}, line {number + 1}: is not JSON")


def _parse(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{complaint} ({error}). Correct it, or save one record a line (.jsonl).") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except ArrowException as error:
        line = (str(error).splitlines() or [""])[0]
        raise OptionError(f"{path}: cannot be read as Parquet ({line}). Save it again.") from None


def _hub(data: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, subset = data.partition(":")
    try:
        found = load_dataset(name, subset or None, split="train")
    except Exception as error:  # whatever the network, the hub and the data set's files can do
        line = (str(error).splitlines() or [""])[0]
        raise HubError(
            f"{data}: is no file here, and cannot be fetched as a data set from the hub ({type(error).__name__}: {line}). Check "
            "the path or the name."
        ) from error
    for number, record in enumerate(found):
        yield f"{data}, row {number + 1}", record
