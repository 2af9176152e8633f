"""Half-Reset: whole tensors go back to pre (`surgery half-reset`; HFT paper, §2, §4.3 and Figure 2).

Which half is drawn decides `choose`, shared with half fine-tuning (HFT), which freezes what Half-Reset would reset:

    category   in each layer, of the attention matrices a half; of the feed-forward matrices, when their number is odd, ⌈half⌉
               in a random half of the layers and ⌊half⌋ in the others; of the norms a half  (the paper's default)
    layer      all of every other layer
    model      of all block matrices, wherever they stand, a half

A bias goes with its weight. Embedding, head and final norm stay ft (paper, footnote 1) and so do routers.

A draw is the order of SHA-256(seed, purpose, name), so the same seed gives the same tensors on any machine, whatever the
order of the shards. Each expert of a mixture that is stored by itself counts as a matrix; experts stacked in one tensor go
together. With several stacks of layers (encoder and decoder) each is halved by itself.

Cost: a copy of the file.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.layout import place, unit
from surgery.methods.actions import Action, Keep, Reset
from surgery.methods.method import Method
from surgery.methods.scope import number, one_of, share
from surgery.option import Swept, option

LEVELS = ("category", "layer", "model")
ALSO = ("embedding", "head", "norm")


@dataclass(frozen=True)
class HalfReset(Method):
    """Reset a random half of the block tensors to pre.

    Args:
        ratio: the share of tensors that is reset, in [0, 1].
        level: "category", "layer" or "model": see `choose`.
        seed: which half; any integer ≥ 0.
        also: whole groups outside the blocks to reset too: "embedding", "head", "norm" (the final norm).
    """

    name: ClassVar[str] = "half-reset"
    help: ClassVar[str] = """Reset a random half of the block tensors to pre, as a whole.

    A bias goes with its weight. Embedding, head, final norm and routers stay ft.
    """
    about: ClassVar[str] = "Half-Reset (HFT: Half Fine-Tuning for Large Language Models, §2)"
    ratio: float = option(
        0.5,
        help="Share of the block tensors that is reset, from 0 to 1.",
        swept=Swept("0.25:0.75:0.25", "ratio (share of matrices reset)"),
    )
    level: str = option(
        "category",
        help="[b]category[/b]: a half of each layer's attention, feed-forward and norm tensors. [b]layer[/b]: every other "
        "layer. [b]model[/b]: a half of all block matrices.",
        swept=Swept("category", "level"),
    )
    seed: int = option(
        0, help="Which half. The same seed gives the same tensors on any machine.", swept=Swept("0", "seed")
    )
    also: tuple[str, ...] = option(
        (), help="Reset a group outside the blocks too: embedding, head or norm (the final one). Repeatable."
    )

    def __post_init__(self) -> None:
        share("ratio", self.ratio)
        one_of("level", self.level, LEVELS)
        for group in self.also:
            one_of("also", group, ALSO)
        if self.seed < 0:
            raise OptionError(f"`seed` must be 0 or greater, not {self.seed}.")

    def label(self) -> str:
        return f"half-reset-{number(self.ratio)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        editable = [item for item in items if item.editable]
        if not any(item.place.layer is not None for item in editable):
            raise OptionError("No tensor of ft belongs to a layer, so there is no half to reset.")
        chosen = choose([item.ft.name for item in editable], self.ratio, self.level, self.seed, self.also)
        return [Reset() if item.ft.name in chosen and item.editable else Keep() for item in items]


def choose(
    names: Iterable[str],
    ratio: float,
    level: str = "category",
    seed: int = 0,
    also: Collection[str] = (),
    counts: Mapping[str, Sequence[int]] | None = None,
) -> set[str]:
    """The tensors that Half-Reset resets and HFT freezes.

    Args:
        names: of a model's parameters, in any order.
        ratio: the share to choose, in [0, 1]. Floors and ceilings are spread over the layers so that the total is as close
            to the ratio as whole tensors allow.
        level: "category", "layer" or "model".
        seed: the draw.
        also: whole groups outside the blocks, all of which are chosen: "embedding", "head", "norm".
        counts: for level "category", in the ratio's place: category ("attention", "feed_forward" or "norm") -> how many of its
            matrices are chosen in the first layer, the second, …; after the last number the first comes again.

    Returns:
        Names of the chosen tensors, biases with their weights.

    Raises:
        OptionError: a layer has fewer matrices than are to be chosen.
    """
    # stack -> layer -> category -> module -> its tensors
    stacks: dict[str, dict[int, dict[str, dict[str, list[str]]]]] = {}
    chosen: set[str] = set()
    for name in names:
        where = place(name)
        if where.layer is None and where.category in also:
            chosen.add(name)
        elif where.layer is not None and where.category in ("attention", "feed_forward", "norm"):
            layer = stacks.setdefault(where.stack, {}).setdefault(where.layer, {})
            layer.setdefault(where.category, {}).setdefault(unit(name), []).append(name)
    for stack, layers in sorted(stacks.items()):
        units = {
            key: unit_names
            for layer in layers.values()
            for modules in layer.values()
            for key, unit_names in modules.items()
        }
        if level == "layer":
            picked = _every_other(layers, ratio)
        elif level == "model":
            matrices = [
                key
                for layer in layers.values()
                for category in ("attention", "feed_forward")
                for key in layer.get(category, {})
            ]
            picked = set(_draw(matrices, _half_up(ratio * len(matrices)), seed, f"model {stack}"))
        else:
            picked = _by_category(stack, layers, ratio, seed, counts or {})
        chosen.update(name for key in picked for name in units[key])
    return chosen


def _every_other(layers: dict[int, dict[str, dict[str, list[str]]]], ratio: float) -> set[str]:
    picked: set[str] = set()
    for position, index in enumerate(sorted(layers)):
        # Spreads any ratio evenly; at 0.5 the first, third, … layer.
        if _half_up((position + 1) * ratio) > _half_up(position * ratio):
            picked.update(key for modules in layers[index].values() for key in modules)
    return picked


def _by_category(
    stack: str,
    layers: dict[int, dict[str, dict[str, list[str]]]],
    ratio: float,
    seed: int,
    fixed: Mapping[str, Sequence[int]],
) -> set[str]:
    by_category: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for index, layer in layers.items():
        for category, modules in layer.items():
            by_category[category][index] = list(modules)
    picked: set[str] = set()
    for category, members in sorted(by_category.items()):
        exact = {index: ratio * len(keys) for index, keys in members.items()}
        counts = {index: math.floor(value) for index, value in exact.items()}
        uneven = [index for index in exact if exact[index] > counts[index]]
        missing = _half_up(ratio * sum(map(len, members.values()))) - sum(counts.values())
        for extra in _draw(map(str, uneven), missing, seed, f"layers {stack} {category}"):
            counts[int(extra)] += 1
        if category in fixed:
            counts = _in_turn(members, fixed[category], category)
        for index, keys in members.items():
            picked.update(_draw(keys, counts[index], seed, f"{category} {index}"))
    return picked


def _in_turn(members: Mapping[int, Sequence[str]], numbers: Sequence[int], category: str) -> dict[int, int]:
    """Layer -> how many of its matrices are chosen, the numbers taking turns."""
    counts = {index: numbers[place % len(numbers)] for place, index in enumerate(sorted(members))}
    for index, count in counts.items():
        if count > len(members[index]):
            words = category.replace("_", "-")
            raise OptionError(
                f"Layer {index} has {len(members[index])} {words} matrices, so {count} of them cannot be chosen. Lower "
                f"`frozen_{category}`."
            )
    return counts


def _draw(keys: Iterable[str], count: int, seed: int, purpose: str) -> list[str]:
    """`count` of the keys, at random."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest())[:count]


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
