"""Text data as records: JSON Lines, a JSON list, Parquet, or a data set on the hub, read only as far as is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import HubError, OptionError, reason
from surgery.paths import expanded

ENDINGS = (".jsonl", ".json", ".parquet")
MAX_LINE = 1 << 26  # characters
MAX_JSON = 1 << 28  # bytes of a JSON file that is no JSON Lines


def local(data: str, endings: Sequence[str] = ENDINGS) -> Path | None:
    """The file that `data` names; None where it must be a data set on the hub.

    Args:
        endings: of the files that can be read.

    Raises:
        OptionError: it is a folder, a file of another kind, or looks like a file that does not exist.
    """
    path = expanded(data)
    ending = path.suffix.lower()
    if path.is_dir():
        raise OptionError(f"{data}: is a folder. Give a {', '.join(endings)} file, or a data set on the hub.")
    if path.exists() and ending not in endings:
        raise OptionError(f"{data}: text is read from {', '.join(endings)}. Rename or convert it.")
    if not path.exists() and (ending in endings or path.is_absolute()):
        raise OptionError(f"{data}: no such file. Check the path.")
    if path.exists() and not path.is_file():
        raise OptionError(f"{data}: is no regular file but a pipe or a device, which surgery never reads. Give a file.")
    return path if path.exists() else None


def records(data: str, *, fields: Sequence[str] = (), streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """The records of a file, or of the "train" split of a data set on the hub, each with where it stands.

    Args:
        data: a path, or `name` or `name:subset` on the hub.
        fields: of a Parquet file, read the first of these columns that it has alone; all where it has none.
        streaming: do not fetch the whole of a data set on the hub.

    Raises:
        OptionError: it cannot be read.
        HubError: it cannot be fetched.
    """
    path = local(data)
    if path is None:
        yield from _hub(data, streaming)
        return
    try:
        yield from _parquet(path, fields) if path.suffix.lower() == ".parquet" else _json(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:  # with or without the mark that Windows puts first
        while (start := file.read(1)).isspace():
            pass
        file.seek(0)
        if start == "[":
            if path.stat().st_size > MAX_JSON:
                raise OptionError(
                    f"{path}: is a JSON list of more than {MAX_JSON:,} bytes. Save it with one record a line (.jsonl)."
                )
            for number, record in enumerate(_parse(file.read(), f"{path}: is not JSON")):
                yield f"{path}, record {number + 1}", record
            return
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise OptionError(f"{path}: line {number} is longer than {MAX_LINE:,} characters. Split the document.")
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}: line {number} is not JSON")


def _parse(text: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{complaint} ({error}). Correct it, or save one record a line (.jsonl).") from None


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise OptionError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow.") from None
    try:
        number = 0
        with ParquetFile(path) as file:
            columns = [name for name in fields if name in file.schema_arrow.names][:1] or None
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except ArrowException as error:
        raise OptionError(f"{path}: cannot be read as Parquet ({reason(error)}). Save it again.") from error


def _hub(data: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise OptionError(
            f"{data}: is no file, and a data set from the hub needs datasets: pip install datasets."
        ) from None
    name, _, subset = data.partition(":")
    try:
        for number, record in enumerate(load_dataset(name, subset or None, split="train", streaming=streaming)):
            yield f"{data}, record {number + 1}", record
    except Exception as error:  # whatever the network, the hub and the data set's files can do
        raise HubError(
            f"{data}: is no file, and cannot be fetched as a data set from the hub ({reason(error)}). Check the path or the name."
        ) from error
