"""DARE: drop at random and rescale (`surgery dare`; Yu et al., "Language Models are Super Mario", arXiv 2311.03099, §3.2).

    τ_i = ft_i − pre                                 one tensor of the i-th fine-tuned model, any shape
    τ̂_i = m_i · τ_i / (1 − p)                        m_i = 0 with probability p, else 1: Eq. 1
    out = pre + λ · Σ_i τ̂_i                          task arithmetic, as the paper merges (§3.3); mergekit's dare_linear

Every model has the weight λ: mergekit's `weight` for each and `normalize: false`. mergekit rescales to the L1 norm of before;
here the factor is 1/(1 − p), as in the paper, and λ/(1 − p) is applied once, to the float32 sum.

The draw is Philox 4x64-10, a counter-based generator, keyed by a hash of seed, tensor name and the model's position: an entry's
fate depends on nothing else, on any machine. Where the sum is 0 the output is the bits of pre; where λ/(1 − p) = 1 and one model
alone is in the sum it is the bits of that model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from surgery.checkpoint.item import Item
from surgery.methods.actions import Action, Merge, Reset
from surgery.methods.method import Method
from surgery.methods.scope import LAM, Scope, finite, number, plan_pruning, share
from surgery.option import Swept, nested, option

# Entries that one block of the generator decides: four 64-bit words, 32 bits an entry.
BLOCK = 8


@dataclass(frozen=True)
class Dare(Method):
    """Drop a random share of each task vector, rescale the rest, and add them to pre.

    Args:
        drop_rate: p, in [0, 1]. The paper's is 0.9 and more.
        lam: λ, the weight of each task vector.
        seed: of the draw.
        scope: which tensors are merged, and what becomes of the others.
    """

    name: ClassVar[str] = "dare"
    merges: ClassVar[bool] = True
    help: ClassVar[
        str
    ] = """Drop a random share of each task vector, rescale the rest by 1 / (1 − p), and add them to pre.

    out = pre + λ · Σ τ̂, over the --ft given.
    """
    about: ClassVar[str] = "DARE, drop and rescale (arXiv 2311.03099)"
    drop_rate: float = option(
        0.9,
        help="p: each entry of a task vector is dropped with this probability, from 0 to 1.",
        swept=Swept("0.5:0.9:0.1", "drop rate"),
    )
    lam: float = option(1.0, help=LAM)
    seed: int = option(
        0, help="Of the draw. The same seed drops the same entries on any machine.", swept=Swept("0", "seed")
    )
    scope: Scope = nested(Scope)

    def __post_init__(self) -> None:
        share("drop_rate", self.drop_rate)
        finite("lam", self.lam)

    def label(self) -> str:
        return f"dare-{number(self.drop_rate)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        if self.drop_rate == 1:
            return plan_pruning(items, self.scope, lambda _: Reset())
        keeps = partial(draw, self.seed, self.drop_rate)
        return plan_pruning(items, self.scope, lambda _: Merge(combine, self.lam / (1 - self.drop_rate), keeps))


def draw(seed: int, drop_rate: float, name: str, model: int, start: int, count: int) -> Any:
    """Which entries [start, start + count) of a tensor are not dropped: bool [count].

    Entry e is dropped where the e-th 32-bit word of the tensor's stream is below drop_rate · 2³².

    Args:
        name: the tensor's, in the first model.
        model: the fine-tuned model's position, from 0.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}\n{model}".encode()).digest()[:16], "little")
    skip = start % BLOCK
    stream = np.random.Philox(key=key, counter=start // BLOCK)
    words = stream.random_raw((skip + count + 1) // 2).astype("<u8", copy=False).view("<u4")
    limit = round(drop_rate * 2**32)
    return words[skip : skip + count] >= np.uint32(limit) if limit < 2**32 else np.zeros(count, np.bool_)


def combine(dropped: list[Any]) -> tuple[Any, list[Any]]:
    """The sum of the task vectors, float32, and for each model the entries (bool) that are part of it."""
    return sum(dropped[1:], start=dropped[0]), [vector != 0 for vector in dropped]
