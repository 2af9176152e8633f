"""An option, declared once, in the dataclass whose field holds its value.

The field has the type and the default; `option` adds the help text and what else the command line and a sweep need to know. From
that the commands make their options (`surgery.commands.builder`) and a sweep its settings (`surgery.comparison.grid`). A
dataclass may hold another one, with `nested`, whose options stand beside its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_type_hints

Part = TypeVar("Part")
# Name of a parameter -> its option, of all commands that were made; empty where surgery is used from Python.
FLAGS: dict[str, str] = {}
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Swept:
    """How a sweep varies an option.

    Attributes:
        grid: what is tried where nothing is asked for, as a user would type it.
        axis: what the number is called on a chart.
        named: settings with a name of their own.
    """

    grid: str
    axis: str
    named: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """Facts about an option beside its type and default.

    Attributes:
        help: one or two sentences; may hold rich markup.
        flag: its name on the command line where that is not the field's.
        panel: the heading that it stands under in the help.
        metavar: what stands for its value in the help.
        shown: the default in words; False for none.
        parse: makes the value from the typed text; raises ValueError.
        swept: how a sweep varies it; None where it stays.
        argument: it is given by its place, without a name.
        tried: it is not one value but several texts, each of which says what to try.
    """

    help: str
    flag: str | None = None
    panel: str | None = None
    metavar: str | None = None
    shown: str | bool = True
    parse: Parse | None = None
    swept: Swept | None = None
    argument: bool = False
    tried: bool = False


@dataclass(frozen=True)
class Declared:
    """An option with its field's name, type and default (MISSING where it has to be given)."""

    name: str
    kind: Any
    default: Any
    option: Option


def option(default: Any = MISSING, *, help: str, **more: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        default: of the field; without one the option has to be given.
        help, more: as for `Option`.
    """
    return field(default=default, metadata={"option": Option(help, **more)})


def nested(kind: type) -> Any:
    """A dataclass field that holds another dataclass, with its default values."""
    return field(default_factory=kind, metadata={"nested": kind})


def flat(kind: type, changes: Mapping[str, Mapping[str, Any]] | None = None) -> type:
    """A dataclass of the same options that checks nothing, with none inside another.

    Args:
        changes: other words for some options: name -> fields of `Option`.
    """
    changes = changes or {}
    found = [replace(one, option=replace(one.option, **changes.get(one.name, {}))) for one in declared_options(kind)]
    return _made(kind.__name__, found)


def chosen(kind: type, names: Sequence[str], **words: Any) -> type:
    """Some of a dataclass's options, with other words where given."""
    found = {one.name: one for one in declared_options(kind)}
    return _made(kind.__name__, [replace(found[name], option=replace(found[name].option, **words)) for name in names])


def united(kinds: Sequence[type], *, changed: Callable[[Declared, Sequence[type]], Option] | None = None) -> type:
    """All options of several dataclasses, each once and None where it is not given.

    Args:
        changed: takes an option and the dataclasses that have it, and says it in other words.
    """
    found: dict[str, Declared] = {}
    having: dict[str, list[type]] = {}
    for kind in kinds:
        for one in declared_options(kind):
            found.setdefault(one.name, one)
            having.setdefault(one.name, []).append(kind)
    options = []
    for name, one in found.items():
        words = changed(one, having[name]) if changed else one.option
        kind = tuple[str, ...] if words.tried else _optional(one.kind)
        options.append(replace(one, kind=kind, default=None, option=words))
    return _made("United", options)


def _optional(kind: Any) -> Any:
    return kind if kind is None else kind | None


def _made(name: str, options: Sequence[Declared]) -> type:
    parts = [(one.name, one.kind, field(default=one.default, metadata={"option": one.option})) for one in options]
    return make_dataclass(name, parts, frozen=True, kw_only=True, repr=False, eq=False)


def declared_options(kind: type) -> tuple[Declared, ...]:
    """The options of a dataclass and of those that it holds, in the order of the fields. Fields that are none are left out."""
    return _declared_options(kind)


@cache
def _declared_options(kind: type) -> tuple[Declared, ...]:
    return tuple(_walk(kind))


def _walk(kind: type) -> Iterator[Declared]:
    types = get_type_hints(kind)
    for entry in sorted(fields(kind), key=lambda entry: entry.kw_only is True):  # what a base class adds stands last
        if "nested" in entry.metadata:
            yield from declared_options(entry.metadata["nested"])
        elif "option" in entry.metadata:
            yield Declared(entry.name, types[entry.name], entry.default, entry.metadata["option"])


def build(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """The dataclass with those of the values that are its options or those of what it holds; the others have their defaults.

    Raises:
        OptionError: the dataclass refuses a value.
    """
    made: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if "nested" in entry.metadata:
            made[entry.name] = build(entry.metadata["nested"], values)
        elif "option" in entry.metadata and entry.name in values:
            made[entry.name] = values[entry.name]
    return kind(**made)


def value_of(held: Any, name: str) -> Any:
    """The value of an option in a dataclass or in one that it holds."""
    for entry in fields(held):
        if entry.name == name and "option" in entry.metadata:
            return getattr(held, name)
        if "nested" in entry.metadata and name in {one.name for one in declared_options(entry.metadata["nested"])}:
            return value_of(getattr(held, entry.name), name)
    raise KeyError(name)


def flag(name: str) -> str:
    """The option's name on the command line: "drop_rate" as "--drop-rate"."""
    return f"--{name.replace('_', '-')}"


def with_flags(message: str) -> str:
    """A message of a function that knows no command line, with options for its parameters: `drop_rate` becomes --drop-rate."""
    return re.sub(r"`(\w+)`", lambda name: FLAGS.get(name[1], name[0]), message)
