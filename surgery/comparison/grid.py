"""The settings that a sweep tries: numbers and ranges as people type them, the methods they make, and the order to try.

A method's options say which of them are swept, and over which grid (`surgery.option.Swept`). The first of them is its main one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation, Overflow
from itertools import product
from typing import Any

from surgery.errors import OptionError
from surgery.methods import METHODS, Method
from surgery.methods.method import main_option, swept_options
from surgery.methods.scope import number
from surgery.option import Declared, build, declared_options, flag, value_of

MOST = 1000  # settings of one option
EXACT = 10**15  # whole numbers up to here are floats, too


def axis_of(kind: type[Method]) -> str:
    """The name of a method's main number on a chart."""
    swept = main_option(kind).option.swept
    return swept.axis if swept else ""


def named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in METHODS:
        raise OptionError(f"`method` takes {', '.join(METHODS)}, not {name!r}.")
    return METHODS[name]


def settings(
    kind: type[Method], typed: Mapping[str, Sequence[str]] | None = None, fixed: Mapping[str, Any] | None = None
) -> list[Method]:
    """A method at each of its settings, along its main number.

    Args:
        typed: for a swept option, what to try, as a user types it; its own grid where it is missing.
        fixed: values of the other options. With a `depth` the main number has only its default.

    Raises:
        OptionError: a text is no setting, or a number is out of range.
    """
    typed, options = typed or {}, swept_options(kind)
    if (fixed or {}).get("depth"):
        main, *options = options
        if main.name in typed:
            raise OptionError(f"`depth` says what `{main.name}` is: leave `{main.name}` out.")
    grids = [
        _values(one, typed.get(one.name) or [one.option.swept.grid if one.option.swept else ""]) for one in options
    ]
    return [
        build(kind, {**(fixed or {}), **{one.name: value for one, value in zip(options, values, strict=True)}})
        for values in product(*grids)
    ]


def _values(one: Declared, texts: Sequence[str]) -> tuple[Any, ...]:
    """The values of an option: words, numbers, or where it has parts (several ratios) whole settings, and ranges of single ones.

    Raises:
        OptionError: a text says neither.
    """
    text = ",".join(texts)
    if one.kind is str:
        return tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if one.option.parse is None:
        return whole_numbers(text, one.name) if one.kind is int else numbers(text, one.name)
    found: dict[Any, None] = {}
    for text in texts:
        if one.option.swept and text in one.option.swept.named:
            found |= dict.fromkeys(one.option.swept.named[text])
        elif ":" in text:
            found |= dict.fromkeys((value,) for value in numbers(text, one.name))
        else:
            found.setdefault(tuple(numbers(word, one.name)[0] for word in text.split(",")))
    return tuple(sorted(found, key=lambda parts: (len(parts), parts)))


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Numbers with commas between them, sorted; a:b:step is a, a + step, …, as far as b, which is one of them if a step meets it.

    The steps are decimal: 0.5:0.95:0.05 ends with 0.95 itself.

    Raises:
        OptionError: it is neither, or too many.
    """
    found: dict[float, None] = {}
    for part in text.split(","):
        try:
            ends = [Decimal(word.strip()) for word in part.split(":")]
        except InvalidOperation:
            ends = []
        if len(ends) not in (1, 3) or not all(end.is_finite() for end in ends):
            raise OptionError(f"`{name}` takes numbers such as 0.5,0.9 or a range such as 0.5:0.95:0.05, not {text!r}.")
        if len(ends) == 1:
            found.setdefault(float(ends[0]))
            continue
        first, last, step = ends
        if step <= 0 or last < first:
            raise OptionError(f"`{name}` {part}: a range goes up, from the first number to the second by the third.")
        try:
            many = (last - first) / step >= MOST
        except Overflow:
            many = True
        if many:
            raise OptionError(f"`{name}` {part}: more than {MOST:,} numbers. Take a larger step.")
        count = int((last - first) / step) + 1
        found |= dict.fromkeys(float(first + step * place) for place in range(count))
    return tuple(sorted(found))


def whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers, likewise.

    Raises:
        OptionError: one is no whole number.
    """
    found = numbers(text, name)
    for value in found:
        if not value.is_integer() or abs(value) > EXACT:
            raise OptionError(f"`{name}` takes whole numbers of at most 15 digits, not {number(value)}.")
    return tuple(map(int, found))


def label(method: Method) -> str:
    """A setting's row: the method and its numbers, such as "fapm 0.9" or "half-reset 0.5 seed 1"."""
    main = main_option(type(method))
    others = [one for one in declared_options(type(method)) if one.name not in ("depth", main.name)]
    changed = [one for one in others if value_of(method, one.name) != one.default]
    words = [f"{one.name.replace('_', ' ')} {_text(value_of(method, one.name))}" for one in changed]
    return " ".join([method.name, _text(method.depth or value_of(method, main.name)), *words])


def line(method: Method) -> tuple[Any, ...] | None:
    """A key that settings share which differ in their main number alone; None where that is several numbers."""
    main, *_ = swept_options(type(method))
    value = value_of(method, main.name)
    if isinstance(value, tuple) and len(value) > 1:
        return None
    others = (value_of(method, one.name) for one in declared_options(type(method)) if one.name != main.name)
    return (method.name, *others)


def coarse_to_fine(count: int) -> list[int]:
    """The positions of a list, both ends first, then the middle of every gap again and again: what is done first says most."""
    order, gaps = list(dict.fromkeys((0, count - 1)))[:count], [(0, count - 1)]
    while gaps:
        split = [((low + high) // 2, low, high) for low, high in gaps if high - low > 1]
        order += [middle for middle, _, _ in split]
        gaps = [half for middle, low, high in split for half in ((low, middle), (middle, high))]
    return order


def interleaved(groups: Sequence[Sequence[Method]]) -> list[Method]:
    """The settings of several methods in the order to try them: each from coarse to fine, the methods in turn."""
    orders = [[group[place] for place in coarse_to_fine(len(group))] for group in groups]
    longest = max(map(len, orders), default=0)
    return [order[place] for place in range(longest) for order in orders if place < len(order)]


def command_words(method: Method, pre: str, ft: str, more: Sequence[str] = ()) -> list[str]:
    """The command line that carries out an edit.

    Args:
        pre, ft: as typed.
        more: further options.
    """
    words = ["surgery", method.name, "--pre", pre, "--ft", ft]
    for one in declared_options(type(method)):
        value = value_of(method, one.name)
        if one.name not in ("depth", main_option(type(method)).name) and value != one.default:
            for each in value if isinstance(value, tuple) else (value,):
                words += [flag(one.name), _text(each)]
    return [*words, *setting_words(method), *more]


def setting_words(method: Method) -> list[str]:
    """The option for a method's main number, or for its numbers by depth, and the value."""
    name = "depth" if method.depth else main_option(type(method)).name
    return [flag(name), _text(value_of(method, name))]


def _text(value: Any) -> str:
    """A value as a user types it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return number(value) if isinstance(value, float) else str(value)
