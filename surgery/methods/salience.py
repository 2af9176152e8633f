"""Salience: only what moved far, in rows whose meaning moved, is kept (`surgery salience`; mergekit's `arcee_fusion`).

    S_ij = |Δ_ij| · KL(softmax(ft_i) ‖ softmax(pre_i))
    out  = ft where S ≥ median + threshold · (Q3 − Q1), elsewhere pre

    Δ        ft − pre, one tensor, [rows, width]; more dimensions before the last count as rows
    i        a row along the last dimension of the stored tensor, as in mergekit
    KL       a value for each row: Σ_j p_j · log(p_j / q_j), p and q the two softmaxes
    Q1, median, Q3   the scores of rank ⌊q · (n − 1)⌋ from 0, q = 0.25, 0.5, 0.75, over the tensor's n entries, as in mergekit

The divergence is computed in float64 and rounded to float32 once; mergekit has it in the tensor's type, and 10⁻⁸ added to each p
and q. The quartiles are exact; mergekit's are those of a sample above a million entries. Where all three are 0, since most
entries did not move, every entry is kept.

Cost: three passes over both files; a row of both is in memory at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgery.checkpoint.item import Item
from surgery.methods.actions import Action, KeepSalient
from surgery.methods.method import Method
from surgery.methods.scope import Scope, finite, number, plan_pruning
from surgery.option import Swept, nested, option


@dataclass(frozen=True)
class Salience(Method):
    """Keep the outliers of |Δ| times the divergence of the row.

    Args:
        threshold: how far above the median an entry must lie to be kept, in distances of the quartiles; any number. mergekit's
            is 1.5.
        scope: which tensors are pruned, and what becomes of the others.
    """

    name: ClassVar[str] = "salience"
    help: ClassVar[
        str
    ] = """Keep the entries that stand out, by how far they moved and how much their row changed its meaning.

    S = |Δ| · KL(softmax(row of ft) ‖ softmax(row of pre)); kept where S ≥ median + threshold · (Q3 − Q1) of the tensor.
    """
    about: ClassVar[str] = "salience, outliers of |Δ| times the divergence of the row (mergekit's arcee_fusion)"
    threshold: float = option(
        1.5,
        help="How far above the median a score must lie to be kept, in distances of the quartiles.",
        swept=Swept("0:3:0.5", "threshold (quartile distances above the median)"),
    )
    scope: Scope = nested(Scope)

    def __post_init__(self) -> None:
        finite("threshold", self.threshold)

    def label(self) -> str:
        return f"salience-{number(self.threshold)}"

    def plan(self, items: Sequence[Item]) -> list[Action]:
        return plan_pruning(items, self.scope, lambda _: KeepSalient(divergence, self.threshold))


def divergence(ft: Any, pre: Any) -> Any:
    """KL(softmax(row of ft) ‖ softmax(row of pre)) of each row.

    Args:
        ft, pre: float64 [rows, width].

    Returns:
        float32 [rows], 0 or more; NaN where a row holds NaN or Inf.
    """
    log_p, log_q = _log_softmax(ft), _log_softmax(pre)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0).astype(np.float32)


def _log_softmax(rows: Any) -> Any:
    shifted = rows - rows.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
