"""Which tensors a pruning method edits, and the checks that the methods' options share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action, Keep, Prune, Reset
from surgery.option import Swept, option

SCOPES = {
    "all": ("attention", "feed_forward", "embedding", "head"),
    "linear": ("attention", "feed_forward"),
}
GROUPS = ("tensor", "expert")
# What several methods' options are, word for word.
SPARSITY: dict[str, Any] = {
    "help": "Share of each tensor's entries that goes back to pre, from 0 to 1.",
    "swept": Swept("0.5:0.95:0.05", "sparsity"),
}
GROUP = "What has a threshold of its own: [b]tensor[/b], or [b]expert[/b], each one of a stacked [E, …] tensor."
LAM = "λ, the factor of the merged task vector."


@dataclass(frozen=True)
class Scope:
    """The tensors that are pruned: floating point, two or more dimensions, of the categories that `scope` names.

    Args:
        scope: "all" (attention, feed-forward, embedding and head) or "linear" (attention and feed-forward). Routers are in
            neither. "all" is METHODS' decision, from a measurement: see docs/methods.md.
        rest: "ft" or "pre": what becomes of paired tensors out of scope (norms, biases, routers). Tensors that only ft has,
            integers, buffers and names that no rule knows stay ft.
        include: regular expressions; when given, only tensors whose name one of them matches somewhere are in scope.
        exclude: regular expressions; tensors whose name one of them matches somewhere are out of scope.
    """

    scope: str = option(
        "all",
        help="Tensors to prune: [b]all[/b] (attention, feed-forward, embedding, head) or [b]linear[/b] (attention, "
        "feed-forward). Routers, norms and biases are in neither.",
    )
    rest: str = option("ft", help="What becomes of tensors out of scope: [b]ft[/b] or [b]pre[/b].")
    include: tuple[str, ...] = option(
        (), help="Prune only tensors whose name this regular expression matches somewhere. Repeatable."
    )
    exclude: tuple[str, ...] = option(
        (), help="Leave out tensors whose name this regular expression matches. Repeatable."
    )

    def __post_init__(self) -> None:
        one_of("scope", self.scope, tuple(SCOPES))
        one_of("rest", self.rest, ("ft", "pre"))
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    raise OptionError(f"`{name}` {pattern!r} is not a regular expression: {error}.") from None


def plan_pruning(items: Sequence[Item], scope: Scope, action: Callable[[Item], Action]) -> list[Action]:
    """Give what is in scope an action of its own; the rest follows `scope.rest`.

    Raises:
        OptionError: a pattern matches no tensor, or nothing is left in scope.
    """
    names = [item.ft.name for item in items]
    included = set().union(*(_matches("include", pattern, names) for pattern in scope.include))
    excluded = set().union(*(_matches("exclude", pattern, names) for pattern in scope.exclude))

    def in_scope(item: Item) -> bool:
        return (
            item.editable
            and len(item.ft.shape) >= 2
            and item.place.category in SCOPES[scope.scope]
            and (not scope.include or item.ft.name in included)
            and item.ft.name not in excluded
        )

    if not any(map(in_scope, items)):
        raise OptionError("No tensor is in scope, so there is nothing to prune: see `scope`, `include` and `exclude`.")
    rest = Reset() if scope.rest == "pre" else Keep()
    return [action(item) if in_scope(item) else rest if item.editable else Keep() for item in items]


def is_stacked(item: Item) -> bool:
    """Whether a tensor is experts stacked in one, [E, …]."""
    return len(item.ft.shape) == 3 and item.place.category == "feed_forward" and item.ft.shape[0] > 0


def matrices(action: Action, item: Item) -> Action:
    """The action where a tensor is a matrix, or experts that are one each; what has other dimensions stays ft."""
    return action if len(item.ft.shape) == 2 or is_stacked(item) else Keep()


def grouped(prune: Prune, group: str, item: Item) -> Prune:
    """The pruning of one tensor.

    Args:
        group: what has a threshold of its own: "tensor", or "expert" for each expert of a stacked [E, …] tensor, as if it were
            stored by itself.
    """
    return replace(prune, groups=item.ft.shape[0]) if is_stacked(item) and group == "expert" else prune


def _matches(name: str, pattern: str, names: Sequence[str]) -> set[str]:
    found = {each for each in names if re.search(pattern, each)}
    if not found:
        raise OptionError(f"`{name}` {pattern!r} matches no tensor; ft has names like {names[0]}.")
    return found


def share(name: str, value: float) -> None:
    """Raise OptionError unless value lies in [0, 1]."""
    if not 0 <= value <= 1:  # NaN fails too
        raise OptionError(f"`{name}` must be between 0 and 1, not {value}.")


def finite(name: str, value: float) -> None:
    """Raise OptionError unless value is a number."""
    if not math.isfinite(value):
        raise OptionError(f"`{name}` must be a finite number, not {value}.")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise OptionError unless value is one of the choices."""
    if value not in choices:
        raise OptionError(f"`{name}` must be one of {', '.join(choices)}, not {value!r}.")


def number(value: float) -> str:
    """0.9 as "0.9", 1.0 as "1": for names of folders."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))
