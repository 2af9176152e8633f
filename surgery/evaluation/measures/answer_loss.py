"""The loss of a model on answers that it is given: mean negative log-likelihood per token, in nats.

Rows become tokens as in training (`surgery train`, TRL's SFTTrainer), the end of the text among them, so that the number is that
of a held-out loss there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.encode import learnt
from surgery.data.rows import Row
from surgery.errors import OptionError
from surgery.evaluation.measures.file import File, Maker
from surgery.evaluation.scores import Kind, Scores, digest, picked

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel


@dataclass(eq=False)
class AnswerLoss:
    """The measure.

    Attributes:
        rows: of `surgery.data.rows.read`: prompt and completion, or text.
    """

    name: str
    rows: list[Row] = field(repr=False)
    kind: Kind = field(default="loss", init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {"measure": "answer loss", "items": digest(self.rows)}

    @property
    def count(self) -> int:
        """How many items it has."""
        return len(self.rows)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a row is an item, and weighs as many tokens as its answer has."""
        from surgery.model.likelihood import fit, loglikelihoods

        rows = picked(self.rows, only)
        pairs = [learnt(model.tokenizer, row, model.folder) for row in rows]
        for number, (_, answer) in enumerate(pairs, 1):
            if not answer:
                raise OptionError(f"{self.name}: row {number} has no token to predict. Remove it.")
        pairs, cut = fit(model, pairs)
        found = loglikelihoods(model, pairs, advance)
        weights = np.array([len(answer) for _, answer in pairs], np.float64)
        values = -np.array(found) / weights
        return Scores(self.kind, values, weights, rows, {"contexts_cut": cut} if cut else {})


def _make(file: File) -> AnswerLoss | None:
    if file.metric not in (None, "loss"):
        return None
    return AnswerLoss(file.name, [file.rows[number] for number in file.chosen])


ANSWER_LOSS = Maker(("loss",), _make)
