"""HMA: heterogeneous model averaging (`surgery hma`; Lin et al., arXiv 2309.06256; MoFO paper, E.5).

The layers are cut into as many parts as there are ratios, and each part is averaged with a weight of its own:

    out = α_p · pre + (1 − α_p) · ft        in float32 (float64 tensors: in float64), cast to ft's dtype

    α_p     the weight of the pre-trained model in part p, as in the authors' code
    p       ⌊P · i / L⌋ for layer i of L; embeddings belong to the first part, final norm and head to the last

One ratio is plain averaging (WiSE-FT). α = 0 gives the bits of ft, α = 1 those of pre. Where the two models agree the output is
what they agree on, though in float32 the formula may be off by its last bit there: our decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.layout import Place
from surgery.methods.actions import Action, Blend, Keep, Reset
from surgery.methods.depth import layer_counts
from surgery.methods.method import Method
from surgery.methods.scope import number, share
from surgery.option import Swept, option

# MoFO paper, E.5: the 15 triples that HMA is compared with.
PAPER = (
    *((0.05, 0.2, 0.35), (0.1, 0.2, 0.3), (0.2, 0.2, 0.2), (0.3, 0.2, 0.1), (0.35, 0.2, 0.05)),
    *((0.3, 0.5, 0.7), (0.4, 0.5, 0.6), (0.5, 0.5, 0.5), (0.6, 0.5, 0.4), (0.7, 0.5, 0.3)),
    *((0.65, 0.8, 0.95), (0.7, 0.8, 0.9), (0.8, 0.8, 0.8), (0.9, 0.8, 0.7), (0.95, 0.8, 0.65)),
)


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"takes numbers with commas between them, such as 0.3,0.2,0.1, not {text!r}.") from None


@dataclass(frozen=True)
class Hma(Method):
    """Average pre and ft, part by part.

    Args:
        ratios: α of each part, from input to output; each in [0, 1].
    """

    name: ClassVar[str] = "hma"
    help: ClassVar[str] = """Average pre and ft, with a weight of its own for each part of the depth.

    out = α · pre + (1 − α) · ft. Embeddings belong to the first part, final norm and head to the last.
    """
    about: ClassVar[str] = "HMA, heterogeneous model averaging (arXiv 2309.06256)"
    ratios: tuple[float, ...] = option(
        (0.5,),
        help="Weight of pre in each part of the model, from input to output: 0.3,0.2,0.1. One number averages all.",
        parse=_ratios,
        swept=Swept("0.1:0.9:0.1", "mean ratio (weight of pre)", {"paper": PAPER}),
    )

    def __post_init__(self) -> None:
        if not self.ratios:
            raise OptionError("`ratios` needs at least one number, such as 0.3,0.2,0.1.")
        for ratio in self.ratios:
            share("ratios", ratio)

    def label(self) -> str:
        return "-".join(["hma", *map(number, self.ratios)])

    def plan(self, items: Sequence[Item]) -> list[Action]:
        layers = layer_counts(item.place for item in items)
        if layers and len(self.ratios) > min(layers.values()):
            raise OptionError(
                f"`ratios` has {len(self.ratios)} numbers, but the model has only {min(layers.values())} layers to cut."
            )
        return [
            average(self.ratios[part(item.place, layers, len(self.ratios))]) if item.editable else Keep()
            for item in items
        ]


def part(where: Place, layers: dict[str, int], parts: int) -> int:
    """The part, from 0, that a tensor belongs to.

    Args:
        where: the tensor's place.
        layers: the number of layers of each stack.
        parts: how many parts there are.
    """
    if where.layer is not None:
        return parts * where.layer // layers[where.stack]
    return 0 if where.side == "input" else parts - 1


def blend(pre: Any, ft: Any, alpha: float) -> Any:
    """alpha · pre + (1 − alpha) · ft.

    Args:
        pre, ft: float32, numpy or torch, one shape.
        alpha: the weight of pre, in [0, 1].

    Returns:
        float32, their shape; two rounded products and one rounded sum, ft itself where pre = ft.
    """
    result = alpha * pre + (1 - alpha) * ft
    same = pre == ft
    result[same] = ft[same]
    return result


def average(alpha: float) -> Action:
    """The action for alpha · pre + (1 − alpha) · ft: at the ends the bits of one of the two."""
    return Keep() if alpha == 0 else Reset() if alpha == 1 else Blend(alpha)
