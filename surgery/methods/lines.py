"""LiNeS: the task vector scaled by depth (`surgery lines`; Wang et al., arXiv 2410.17146).

    out = pre + λ_l · Δ            λ_l = α + (1 − α) · l / (L − 1)

    Δ       ft − pre, one tensor, any shape
    l       its layer, from 0; L the number of layers of its stack
    α       the factor of the first layer; the last one's is 1

Early layers, which hold what is general, go back to pre, and late ones stay as they were fine-tuned. It is computed as HMA's
average, (1 − λ) · pre + λ · ft in float32 (float64 tensors: in float64), cast to ft's dtype: λ = 1 gives the bits of ft, λ = 0
those of pre.

Outside the layers, `outside` decides: "ends" gives embeddings α, final norm and head 1, which continues the line and is our
decision; "alpha" scales all of it by α, as the authors' code does; "ft" leaves it as it is. A stack's only layer has λ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action, Keep
from surgery.methods.depth import depth, layer_counts
from surgery.methods.hma import average
from surgery.methods.method import Method
from surgery.methods.scope import number, one_of, share
from surgery.option import Swept, option

OUTSIDE = ("ends", "alpha", "ft")


@dataclass(frozen=True)
class Lines(Method):
    """Scale the task vector by a factor that grows linearly with the layer.

    Args:
        alpha: the first layer's factor, in [0, 1]; the last layer's is 1.
        outside: the factor outside the layers: "ends", "alpha" or "ft".
    """

    name: ClassVar[str] = "lines"
    help: ClassVar[
        str
    ] = """Scale the task vector by depth (LiNeS): the first layer by α, the last by 1, linearly between.

    out = pre + λ · Δ, λ = α + (1 − α) · l / (L − 1) for layer l of L. α = 1 gives ft.
    """
    about: ClassVar[str] = "LiNeS, the task vector scaled linearly with depth (arXiv 2410.17146)"
    alpha: float = option(
        0.0,
        help="α, the share of the task vector that the first layer keeps, from 0 to 1.",
        swept=Swept("0:0.9:0.1", "α (share of Δ kept in the first layer)"),
    )
    outside: str = option(
        "ends",
        help="Factor outside the layers: [b]ends[/b], α for embeddings and 1 for final norm and head; [b]alpha[/b], α for all, "
        "as in the authors' code; [b]ft[/b], 1 for all.",
    )

    def __post_init__(self) -> None:
        share("alpha", self.alpha)
        one_of("outside", self.outside, OUTSIDE)

    def label(self) -> str:
        return f"lines-{number(self.alpha)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        counts = layer_counts(item.place for item in items)
        if not counts:
            raise OptionError("No tensor of ft belongs to a layer, so there is no depth to scale by.")
        return [average(1 - self._factor(item, counts)) if item.editable else Keep() for item in items]

    def _factor(self, item: Item, counts: dict[str, int]) -> float:
        if item.place.layer is None and self.outside != "ends":
            return self.alpha if self.outside == "alpha" else 1.0
        return self.alpha + (1 - self.alpha) * depth(item.place, counts)
