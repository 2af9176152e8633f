"""The settings that a sweep tries: numbers and ranges as people type them, the methods they make, and the order to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation, Overflow
from typing import Any

from surgery.errors import OptionError
from surgery.methods import METHODS, Dare, HalfReset, Hma, Method
from surgery.methods.scope import Scope, number

# MoFO paper, E.5: the 15 triples that HMA is compared with.
PAPER = (
    *((0.05, 0.2, 0.35), (0.1, 0.2, 0.3), (0.2, 0.2, 0.2), (0.3, 0.2, 0.1), (0.35, 0.2, 0.05)),
    *((0.3, 0.5, 0.7), (0.4, 0.5, 0.6), (0.5, 0.5, 0.5), (0.6, 0.5, 0.4), (0.7, 0.5, 0.3)),
    *((0.65, 0.8, 0.95), (0.7, 0.8, 0.9), (0.8, 0.8, 0.8), (0.9, 0.8, 0.7), (0.95, 0.8, 0.65)),
)
MOST = 1000  # settings of one option
EXACT = 10**15  # whole numbers up to here are floats, too
# The number of a method that a sweep changes.
MAIN = ("sparsity", "drop_rate", "ratio", "ratios")


@dataclass(frozen=True)
class Grid:
    """What is tried of each method.

    Args:
        sparsity: of fapm, magnitude, wanda and ties.
        drop_rate: of dare.
        ratio: of half-reset.
        seed: of half-reset and dare; each with every ratio or rate.
        ratios: of hma.
        scope: of those that prune or merge.
    """

    sparsity: tuple[float, ...]
    drop_rate: tuple[float, ...]
    ratio: tuple[float, ...]
    seed: tuple[int, ...]
    ratios: tuple[tuple[float, ...], ...]
    scope: Scope = field(default_factory=Scope)

    def methods(self, name: str) -> list[Method]:
        """A method at each of its settings, along its main number.

        Raises:
            OptionError: there is no such method, or a number is out of range.
        """
        if name not in METHODS:
            raise OptionError(f"--method takes {', '.join(METHODS)}, not {name!r}.")
        if name == Hma.name:
            return [Hma(ratios) for ratios in self.ratios]
        if name == HalfReset.name:
            return [HalfReset(ratio, seed=seed) for ratio in self.ratio for seed in self.seed]
        if name == Dare.name:
            return [Dare(rate, seed=seed, scope=self.scope) for rate in self.drop_rate for seed in self.seed]
        make: Any = METHODS[name]
        return [make(sparsity=sparsity, scope=self.scope) for sparsity in self.sparsity]


def numbers(text: str, option: str) -> tuple[float, ...]:
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
            raise OptionError(f"{option} takes numbers such as 0.5,0.9 or a range such as 0.5:0.95:0.05, not {text!r}.")
        if len(ends) == 1:
            found.setdefault(float(ends[0]))
            continue
        first, last, step = ends
        if step <= 0 or last < first:
            raise OptionError(f"{option} {part}: a range goes up, from the first number to the second by the third.")
        try:
            many = (last - first) / step >= MOST
        except Overflow:
            many = True
        if many:
            raise OptionError(f"{option} {part}: more than {MOST:,} numbers. Take a larger step.")
        count = int((last - first) / step) + 1
        found |= dict.fromkeys(float(first + step * place) for place in range(count))
    return tuple(sorted(found))


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers, likewise.

    Raises:
        OptionError: one is no whole number.
    """
    found = numbers(text, option)
    for value in found:
        if not value.is_integer() or abs(value) > EXACT:
            raise OptionError(f"{option} takes whole numbers of at most 15 digits, not {number(value)}.")
    return tuple(map(int, found))


def triples(texts: Sequence[str], option: str) -> tuple[tuple[float, ...], ...]:
    """Ratios of hma: each text is one setting with commas, "paper" for the 15 of the MoFO paper, or a range of plain averages.

    Raises:
        OptionError: it is none of these.
    """
    found: dict[tuple[float, ...], None] = {}
    for text in texts:
        if text == "paper":
            found |= dict.fromkeys(PAPER)
        elif ":" in text:
            found |= dict.fromkeys((ratio,) for ratio in numbers(text, option))
        else:
            found.setdefault(tuple(numbers(word, option)[0] for word in text.split(",")))
    return tuple(sorted(found, key=lambda ratios: (len(ratios), ratios)))


def label(method: Method) -> str:
    """A setting's row: the method and its numbers, such as "fapm 0.9" or "half-reset 0.5 seed 1"."""
    seed = getattr(method, "seed", 0)
    return f"{method.name} {_numbers(method)}" + (f" seed {seed}" if seed else "")


def on_a_line(methods: Sequence[Method]) -> bool:
    """Whether settings differ in one number alone: a sparsity, a rate, a ratio."""
    others = {(method.name, getattr(method, "seed", 0), len(getattr(method, "ratios", (0,)))) for method in methods}
    return len(others) == 1 and len(getattr(methods[0], "ratios", (0,))) == 1


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
    for entry in fields(method):  # type: ignore[arg-type]
        value = getattr(method, entry.name)
        if entry.name == "scope":
            for part in fields(value):
                words += _option(part.name, getattr(value, part.name), part.default)
        elif entry.name not in (*MAIN, "calibration", "norms"):  # those of Wanda are `more`
            words += _option(entry.name, value, entry.default)
    return [*words, *setting_words(method), *more]


def setting_words(method: Method) -> list[str]:
    """The option for a method's main number, and its value."""
    name = next(name for name in MAIN if hasattr(method, name))
    return [f"--{name.replace('_', '-')}", _numbers(method)]


def _option(name: str, value: Any, default: Any) -> list[str]:
    if value == default:
        return []
    values = value if isinstance(value, tuple) else (value,)
    return [
        word
        for one in values
        for word in (f"--{name.replace('_', '-')}", number(one) if isinstance(one, float) else str(one))
    ]


def _numbers(method: Method) -> str:
    """A method's main numbers."""
    value = next(getattr(method, name) for name in MAIN if hasattr(method, name))
    return ",".join(map(number, value)) if isinstance(value, tuple) else number(value)
