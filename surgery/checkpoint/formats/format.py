"""The interface of a format: how its files are found in a folder, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.container import Container
from surgery.checkpoint.tensor import Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that hold a model's weights.

    Attributes:
        format: the name of their format.
        files: the files to read, relative to `inside`; with an index, those that it names come on top.
        index: the index that names the shards, if there is one.
        inside: the sub-folder that they lie in; "" for the folder itself.
        beside: a whole model lies beside these files, which change it.
        notes: what the user should know of the choice.
    """

    format: str
    files: tuple[str, ...]
    index: str | None = None
    inside: str = ""
    beside: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """Weights whose headers were read.

    Attributes:
        tensors: by name, in the order of the files.
        files: the files that are read, by name.
        container: how the safetensors files are cut; None for another format.
        notes: what the user should know of how they were found.
    """

    tensors: dict[str, Tensor]
    files: dict[str, Path]
    container: Container | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Base:
    """The other side of a pair, for a format that builds on it.

    Attributes:
        config: its config.json; empty where there is none.
        typed: what the user called it.
    """

    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]
    container: Container | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    typed: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: for people, and in reports.
        find: takes the names of a folder's files; returns those that hold weights in this format, or None.
        open: takes the folder, the choice and, for a format that needs it, the other side; reads headers only.
        endings: of a single file in this format.
        borrows: it lacks config.json and tokenizer, or most of them: the output's come from pre.
        needs_base: it is read with the other side at hand, which gives it numbers or names.
    """

    name: str
    find: Callable[[Collection[str]], Choice | None]
    open: Callable[[Path, Choice, Base | None], Opened]
    endings: tuple[str, ...] = ()
    borrows: bool = False
    needs_base: bool = False


class Unclear(Exception):
    """Files of a format are there, and which of them are the model is not clear; says so as the end of a sentence."""


def top_level(names: Collection[str], endings: tuple[str, ...]) -> list[str]:
    """The names in the folder itself that end so, without hidden ones, sorted."""
    return sorted(name for name in names if "/" not in name and not name.startswith(".") and name.endswith(endings))


def plain(value: Any) -> dict[str, Any]:
    """A value if it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}
