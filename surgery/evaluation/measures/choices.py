"""Which of several texts a model finds likelier: multiple choice, and minimal pairs of a good sentence and a bad one.

    acc         the share of questions whose right choice has the highest Σ log p(token | all before it)
    acc_norm    the same of that sum divided by the choice's length in characters

Names and rules are lm-evaluation-harness's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.choices import CHOICES, filled, is_question, question
from surgery.data.encode import encode, parts, prefix
from surgery.errors import OptionError
from surgery.evaluation.measures.file import File, Maker
from surgery.evaluation.scores import Kind, Scores, digest, picked

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel

PAIR = ("sentence_good", "sentence_bad")


@dataclass(eq=False)
class MultipleChoice:
    """The measure.

    Attributes:
        questions: of `question`: context, choices, and the index of the right one.
        normalised: acc_norm, not acc.
    """

    name: str
    questions: list[dict[str, Any]] = field(repr=False)
    normalised: bool = False
    kind: Kind = field(default="share", init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {
            "measure": "multiple choice",
            "items": digest(self.questions),
            "metric": "acc_norm" if self.normalised else "acc",
        }

    @property
    def count(self) -> int:
        """How many items it has."""
        return len(self.questions)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a question is an item, right or wrong."""
        from surgery.model.likelihood import fit, loglikelihoods

        questions = picked(self.questions, only)
        pairs = [
            parts(model.tokenizer, question["context"], f" {choice}", model.folder)
            for question in questions
            for choice in question["choices"]
        ]
        pairs, cut = fit(model, pairs)
        found = iter(loglikelihoods(model, pairs, advance))
        items = []
        for asked in questions:
            sums = [next(found) for _ in asked["choices"]]
            lengths = [len(choice) if self.normalised else 1 for choice in asked["choices"]]
            chosen = int(np.argmax(np.array(sums) / np.array(lengths)))
            items.append({**asked, "chosen": chosen, "log_likelihoods": sums})
        values = np.array([item["chosen"] == item["answer"] for item in items], np.float64)
        return Scores(self.kind, values, np.ones(len(items)), items, {"contexts_cut": cut} if cut else {})


@dataclass(eq=False)
class MinimalPairs:
    """The measure: the share of pairs whose good sentence has the higher log-likelihood, from its first token on.

    Attributes:
        pairs: of `minimal_pair`.
    """

    name: str
    pairs: list[dict[str, str]] = field(repr=False)
    kind: Kind = field(default="share", init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {"measure": "minimal pairs", "items": digest(self.pairs)}

    @property
    def count(self) -> int:
        """How many items it has."""
        return len(self.pairs)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a pair is an item, right or wrong."""
        from surgery.model.likelihood import loglikelihoods

        before = prefix(model.tokenizer, model.folder)
        pairs = picked(self.pairs, only)
        texts = [pair[name] for pair in pairs for name in PAIR]
        found = loglikelihoods(
            model, [([before], encode(model.tokenizer, text, special=False)) for text in texts], advance
        )
        sums = [(found[at], found[at + 1]) for at in range(0, len(found), 2)]
        items = [{**pair, "log_likelihoods": list(both)} for pair, both in zip(pairs, sums, strict=True)]
        values = np.array([good > bad for good, bad in sums], np.float64)
        return Scores(self.kind, values, np.ones(len(items)), items)


def is_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record is a minimal pair."""
    return all(name in record for name in PAIR)


def minimal_pair(where: str, record: Mapping[str, Any]) -> dict[str, str]:
    """A record as a pair of sentences.

    Raises:
        OptionError: one is missing.
    """
    return {name: filled(where, record, name) for name in PAIR}


def _pairs(file: File) -> MinimalPairs | None:
    if not is_pair(file.first) or file.metric not in (None, "acc"):
        return None
    return MinimalPairs(file.name, file.items(minimal_pair))


def _questions(file: File) -> MultipleChoice | None:
    if is_question(file.first) and file.metric in (None, "acc", "acc_norm"):
        return MultipleChoice(file.name, file.items(question), file.metric == "acc_norm")
    if file.metric in ("acc", "acc_norm") and not file.is_plain:
        wanted = " or ".join([", ".join(CHOICES), *([", ".join(PAIR)] if file.metric == "acc" else [])])
        raise OptionError(
            f"{file.typed}: {file.metric} needs the fields {wanted}. Choose another metric, or rename the fields."
        )
    return None


MINIMAL_PAIRS = Maker(("acc",), _pairs)
MULTIPLE_CHOICE = Maker(("acc", "acc_norm"), _questions)
