"""Wanda on the task vector (`surgery wanda`; FAPM paper §5.2; Sun et al. 2023, arXiv 2306.11695, Eq. 1).

    S_jk = |Δ_jk| · ‖X_k‖₂

    Δ       ft − pre, one weight [out, in]; stored [in, out] by GPT-2 and some mixtures of experts
    X_k     input feature k of this weight over all calibration tokens, when the fine-tuned model runs

Of each output row the entries with the lowest scores go back to pre (the authors' choice; `--group tensor` compares over the
matrix). A head is scored by its own input, an embedding that is tied to it likewise. What has no such input is scored by |Δ|
alone, row by row: an embedding with a head of its own, and an expert that saw no token.

The norms come from the model as it was fine-tuned. The authors prune a model layer by layer and let the pruned layers compute the
next inputs; here it is the task vector that is pruned, and the model whose activations matter is the one that was trained.

Cost: the calibration; then one pass over the rows, two where the weight is stored [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.item import Item
from surgery.errors import OptionError
from surgery.methods.actions import Action, PruneRows
from surgery.methods.method import Method
from surgery.methods.scope import SPARSITY, Scope, number, one_of, plan_pruning, share
from surgery.option import nested, option

GROUPS = ("row", "tensor")


@dataclass(frozen=True, slots=True)
class Norm:
    """‖X_k‖₂ of the input features of one weight.

    Attributes:
        values: float32 [k], or [E, k] for E stacked experts; 0 for an expert that saw no token.
        transposed: whether k runs over the last dimension but one of the stored tensor, not over the last.
        tokens: how many token vectors were seen; int64 [E] for stacked experts.
    """

    values: NDArray[np.float32]
    transposed: bool
    tokens: int | NDArray[np.int64]

    def weights(self) -> NDArray[np.float32]:
        """The values, and 1 where no token was seen: |Δ| alone."""
        seen = np.asarray(self.tokens)[..., None] > 0
        return np.where(seen, self.values, np.float32(1))


@dataclass(frozen=True)
class Wanda(Method):
    """Activation-aware pruning of the task vector.

    Args:
        sparsity: the share of each group's entries that goes back to pre, in [0, 1].
        scope: which tensors are pruned, and what becomes of the others.
        group: "row" or "tensor": what has a threshold of its own.
        calibration: what the norms were measured on, for the report.
        norms: by name in ft; a tensor without one is scored by |Δ|.
    """

    name: ClassVar[str] = "wanda"
    calibrated: ClassVar[bool] = True
    help: ClassVar[
        str
    ] = """Prune the task vector by Wanda's score: how far a weight moved, times how large its input is.

    S = |Δ| · ‖X‖, where ‖X‖ is the norm of the input feature over all tokens when the fine-tuned model runs on calibration text,
    one layer in memory at a time. Needs transformers: pip install 'model-surgery\\[wanda]'.
    """
    about: ClassVar[str] = "Wanda on the task vector, S = |Δ| · ‖X‖₂ (arXiv 2306.11695)"
    sparsity: float = option(0.9, **SPARSITY)
    scope: Scope = nested(Scope)
    group: str = option(
        "row", help="What has a threshold of its own: [b]row[/b] (the output row of a weight) or [b]tensor[/b]."
    )
    calibration: Mapping[str, Any] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict, repr=False, metadata={"parameter": False})

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        one_of("group", self.group, GROUPS)

    def label(self) -> str:
        return f"wanda-{number(self.sparsity)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        return plan_pruning(items, self.scope, self._prune)

    def _prune(self, item: Item) -> PruneRows:
        assert item.pre is not None
        shape, found = item.pre.shape, self.norms.get(item.ft.name)
        if found is None:
            # As stored, a row is what lies one behind the other; of stacked matrices each row of each.
            k = shape[-1] if item.place.category == "feed_forward" else math.prod(shape[1:])
            return PruneRows(np.ones(k, np.float32), self.sparsity, whole=self.group == "tensor")
        stacked = found.values.ndim == 2
        k = shape[-2] if found.transposed else shape[-1] if stacked else math.prod(shape[1:])
        if found.values.shape[-1] != k or (stacked and len(found.values) != shape[0]):
            raise OptionError(
                f"The norms of {item.ft.name} are {list(found.values.shape)}, which does not fit its shape {list(shape)}. "
                "Calibrate again."
            )
        return PruneRows(found.weights(), self.sparsity, found.transposed, self.group == "tensor")
