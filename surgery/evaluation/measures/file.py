"""A file that something is measured on, as each measure sees it when it is asked whether the file is for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.draw import drawn, fewer, letters
from surgery.data.records import records
from surgery.data.rows import Data, Row, read
from surgery.errors import OptionError
from surgery.paths import expanded

if TYPE_CHECKING:
    from surgery.evaluation.scores import Measure

PLAIN = ".txt"


@dataclass(frozen=True)
class Options:
    """Settings of every file; see `surgery.evaluation.measures.find_measures`."""

    limit: int | None
    seq_len: int
    max_new_tokens: int
    prompt_field: str | None
    completion_field: str | None
    keep_reasoning: bool
    max_chars: int | None
    sample: int | None


@dataclass(frozen=True)
class File:
    """A file.

    Attributes:
        typed: the file, as the user named it.
        name: of its measure.
        metric: the one that the user named; None for the one that its fields ask for.
        options: of all files.
    """

    typed: str
    name: str
    metric: str | None
    options: Options

    @property
    def is_plain(self) -> bool:
        """Whether it is text without records."""
        return Path(self.typed).suffix.lower() == PLAIN

    @cached_property
    def first(self) -> Mapping[str, Any]:
        """Its first record, unless the user named the fields; {} where there is none with fields."""
        if self.is_plain or self.options.prompt_field is not None or self.options.completion_field is not None:
            return {}
        found = next((record for _, record in records(self.typed)), None)
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def data(self) -> Data:
        """All its records that are not too long, as training reads them.

        Raises:
            OptionError: it cannot be read so.
        """
        found = read(self.typed, prompt=self.options.prompt_field, completion=self.options.completion_field)
        _sound(self.typed, found.rows)
        return fewer(found, max_chars=self.options.max_chars)

    @property
    def rows(self) -> list[Row]:
        """The rows of `data`."""
        return self.data.rows

    @property
    def chosen(self) -> list[int]:
        """The numbers of the rows that are measured, from 0: the first ones, or some that are drawn."""
        return drawn(len(self.rows), self.options.sample)[: self.options.limit]

    @property
    def is_text(self) -> bool:
        """Whether its records are running text."""
        return "text" in self.rows[0]

    def text(self) -> str:
        """The text of a plain file.

        Raises:
            OptionError: it cannot be read, or is empty.
        """
        found = _plain(expanded(self.typed))
        if not found.strip():
            raise OptionError(f"{self.typed}: holds no text. Check the file.")
        _sound(self.typed, [found])
        return found

    def items(self, make: Callable[[str, Mapping[str, Any]], Any]) -> list[Any]:
        """Its records that are not too long, each made into an item: the first ones up to the limit, or some that are drawn.

        Raises:
            OptionError: one is no record, `make` refuses it, or all are too long.
        """
        found: list[Any] = []
        most = self.options.max_chars
        for where, record in records(self.typed):
            if len(found) == self.options.limit:
                break
            if not isinstance(record, Mapping):
                raise OptionError(f"{where}: is no record with fields. Correct or remove it.")
            item = make(where, record)
            if most is None or letters(item) <= most:
                found.append(item)
        if not found:
            raise OptionError(f"{self.typed}: every record has more than {most:,} characters. Raise `max_chars`.")
        return _sound(self.typed, [found[place] for place in drawn(len(found), self.options.sample)])


@dataclass(frozen=True)
class Maker:
    """A kind of measure in the registry.

    Attributes:
        metrics: the words that a user may name it by.
        make: the measure on a file that is for it; None for another file.
    """

    metrics: tuple[str, ...]
    make: Callable[[File], Measure | None]


def _plain(path: Path) -> str:
    if not path.is_file():
        raise OptionError(f"{path}: is no regular file but a pipe or a device, which surgery never reads. Give a file.")
    try:
        return path.read_text(encoding="utf-8-sig")  # as Windows saves it, too
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None


def _sound(file: str, items: list[Any]) -> list[Any]:
    """Items that tokenizers can take: JSON can hold what is no text."""
    try:
        json.dumps(items, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise OptionError(f"{file}: holds {broken!r}, half of a character. Correct or remove the record.") from None
    return items
