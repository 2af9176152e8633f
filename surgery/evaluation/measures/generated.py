"""Answers that a model writes itself, compared with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.encode import Message, prefix, prompt_ids
from surgery.errors import OptionError
from surgery.evaluation.measures.file import File, Maker
from surgery.evaluation.measures.matching import METRICS
from surgery.evaluation.scores import Kind, Scores, digest, picked

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel

# What a model writes that goes on with questions of its own.
NEXT_QUESTION = "\nQuestion:"
# Between these a model thinks before it answers.
REASONING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)


@dataclass(eq=False)
class Generated:
    """The measure.

    Attributes:
        questions: prompt (text or chat) of each, and the answers that are right.
        metric: of `surgery.evaluation.measures.matching.METRICS`.
        max_new_tokens: of an answer.
        stop: an answer ends before this text.
        keep_reasoning: compare an answer with what the model thought before it.
    """

    name: str
    questions: list[tuple[str | list[Message], list[str]]] = field(repr=False)
    metric: str
    max_new_tokens: int = 256
    stop: str | None = None
    keep_reasoning: bool = False
    kind: Kind = field(default="share", init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = {
            "measure": "generated answers",
            "items": digest(self.questions),
            "metric": self.metric,
            "edition": METRICS[self.metric].edition,
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
            **({"keep_reasoning": True} if self.keep_reasoning else {}),
        }

    @property
    def count(self) -> int:
        """How many items it has."""
        return len(self.questions)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a question is an item."""
        from surgery.model.generation import generate

        questions = picked(self.questions, only)
        prompts = [
            prompt_ids(model.tokenizer, prompt, model.folder) or [prefix(model.tokenizer, model.folder)]
            for prompt, _ in questions
        ]
        answers, cut = generate(model, prompts, self.max_new_tokens, self.stop, advance)
        items: list[dict[str, Any]] = []
        values = []
        extra: dict[str, float] = {"contexts_cut": cut} if cut else {}
        match = METRICS[self.metric].match
        for (prompt, references), answer in zip(questions, answers, strict=True):
            more = {"references": references} if len(references) > 1 else {}
            items.append({"prompt": prompt, "reference": references[0], **more, "generated": answer})
            said = answer if self.keep_reasoning else without_reasoning(answer, references)
            if said != answer:
                extra["reasoning_removed"] = extra.get("reasoning_removed", 0) + 1
            values.append(max(match(said, reference) for reference in references))
        return Scores(self.kind, np.array(values, np.float64), np.ones(len(items)), items, extra)


def without_reasoning(answer: str, references: Sequence[str]) -> str:
    """An answer without the reasoning before it, unless a reference has reasoning too; empty where it never ended."""
    for begin, end in REASONING:
        if any(begin in reference or end in reference for reference in references):
            return answer
        if end in answer:
            return answer.rpartition(end)[2].strip()
        if answer.lstrip().startswith(begin):
            return ""
    return answer


def _make(file: File) -> Generated | None:
    metric, options = file.metric, file.options
    if metric not in METRICS:
        return None
    if file.is_text:
        raise OptionError(
            f"{file.typed}: {metric} needs questions and answers, and this is plain text. Choose perplexity."
        )
    questions = [(file.rows[number]["prompt"], _references(file, number, metric)) for number in file.chosen]
    stop = NEXT_QUESTION if file.data.kind == "question–answer" else None
    return Generated(file.name, questions, metric, options.max_new_tokens, stop, options.keep_reasoning)


def _references(file: File, number: int, metric: str) -> list[str]:
    """The answers of a row that are right and that a metric can compare with.

    Raises:
        OptionError: the metric finds nothing in any of them to compare with.
    """
    known = METRICS[metric]
    completion = file.rows[number]["completion"]
    answer = str(completion if isinstance(completion, str) else completion[-1]["content"]).strip()
    found = [text for text in dict.fromkeys([answer, *file.data.others.get(number, ())]) if known.comparable(text)]
    if not found:
        raise OptionError(
            f"{file.typed}: answer {number + 1} has no {known.needs}, which {metric} needs. Remove it, or choose another metric."
        )
    return found


GENERATED = Maker(tuple(METRICS), _make)
