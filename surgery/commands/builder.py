"""Commands made of dataclasses: every field that is an option (`surgery.option`) becomes one of the command line's.

Typer reads options off a function's parameters. A dataclass is called like a function, and its parameters are its fields: so a
command is a dataclass, put together from those that declare its options, that acts when it is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, make_dataclass, replace
from dataclasses import field as dataclass_field
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer

from surgery.errors import OptionError
from surgery.option import FLAGS, Declared, build, declared_options, flag

# Takes the values of all options and the names of those that were typed, and returns the values to go on with.
Complete = Callable[[dict[str, Any], frozenset[str]], dict[str, Any]]


def command(
    app: typer.Typer,
    name: str,
    parts: Sequence[type],
    act: Callable[..., None],
    *,
    help: str | None = None,
    complete: Complete | None = None,
) -> None:
    """Add a command.

    Args:
        name: as the user types it.
        parts: dataclasses, whose options the command has, in this order. No two may have one of the same name.
        act: carries the command out; takes one instance of each part.
        help: by default the docstring of `act`.
        complete: see `Complete`; what has to be given may come from there.
    """
    options = [one for part in parts for one in declared_options(part)]
    if complete:
        options = [replace(one, default=None) if one.default is MISSING else one for one in options]

    FLAGS.update({one.name: one.option.flag or flag(one.name) for one in options if not one.option.argument})

    def run(self: Any) -> None:
        typed = frozenset(
            one.name
            for one in options
            if getattr(self.context.get_parameter_source(one.name), "name", "") == "COMMANDLINE"
        )
        values = {one.name: _value(name, one, getattr(self, one.name)) for one in options}
        values = complete(values, typed) if complete else values
        act(*(build(part, values) for part in parts))

    fields: list[Any] = [("context", typer.Context)]
    fields += [(one.name, _annotation(one), dataclass_field(default=_default(one))) for one in options]
    made = make_dataclass("Options", fields, kw_only=True, repr=False, eq=False, namespace={"__post_init__": run})
    app.command(name, help=help or inspect.getdoc(act))(made)


def _annotation(one: Declared) -> Any:
    """The typer option for an option."""
    option = one.option
    words: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, "metavar": option.metavar}
    if option.shown is not True or one.default is MISSING or one.default is None:
        words["show_default"] = False if option.shown is True else option.shown
    name = option.flag or flag(one.name)
    if one.kind is bool and one.default:
        return Annotated[bool, typer.Option(f"{name}/--no-{name[2:]}", **words)]
    if option.argument:
        return Annotated[_kind(one), typer.Argument(**words)]
    return Annotated[_kind(one), typer.Option(name, **words)]


def _kind(one: Declared) -> Any:
    if one.option.parse is not None:
        return str if one.default is not None else str | None
    if _is_tuple(one):
        return list[str] | None if one.default is not MISSING else list[str]
    return one.kind | None if one.default is None else one.kind


def _default(one: Declared) -> Any:
    if one.default is MISSING:
        return MISSING
    if one.option.parse is not None and one.default is not None:
        return typed(one.default)
    return None if _is_tuple(one) else one.default


def _value(command: str, one: Declared, given: Any) -> Any:
    """The value of an option, from what typer made of it.

    Raises:
        OptionError: the text does not say a value.
    """
    if one.option.parse is not None and given is not None:
        try:
            return one.option.parse(given)
        except ValueError as error:
            raise OptionError(f"`{one.name}` {error} See `surgery {command} --help`.") from None
    return tuple(given or ()) if _is_tuple(one) else given


def _is_tuple(one: Declared) -> bool:
    kinds = get_args(one.kind) if isinstance(one.kind, UnionType) else (one.kind,)
    return one.option.parse is None and any(get_origin(kind) is tuple for kind in kinds)


def typed(value: Any) -> str:
    """A value as a user would type it: (0.3, 0.2) as "0.3,0.2", 1.0 as "1"."""
    if isinstance(value, tuple):
        return ",".join(map(typed, value))
    return f"{value:g}" if isinstance(value, float) and value == int(value) else str(value)
