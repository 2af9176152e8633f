"""How far a model has moved from its base on text that the base itself writes: the mean over tokens of KL(base ‖ model).

It needs no data. The base writes passages, each token drawn with the probability that the base gives it: half of them from the
beginning of a text on; the other half, where the tokenizer has a chat template, answers in a chat whose question the base
wrote, too. On them the divergence is over the whole vocabulary at each position (self-KL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.encode import end_of_turn, open_turn, prefix, prompt_ids
from surgery.errors import OptionError
from surgery.evaluation.scores import Kind, Scores, picked

if TYPE_CHECKING:
    from surgery.model.divergence import Base
    from surgery.model.language_model import Advance, LanguageModel
    from surgery.model.likelihood import Pair

NAME = "self"
PASSAGES, TOKENS = 128, 64
QUESTION = 32  # tokens of a question, at most
SEED = 0


@dataclass(eq=False)
class OwnText:
    """The measure.

    Attributes:
        passages: how many the base writes.
        tokens: of a passage, at most.
    """

    passages: int = PASSAGES
    tokens: int = TOKENS
    name: str = field(default=NAME, init=False)
    kind: Kind = field(default="divergence", init=False)
    settings: dict[str, Any] = field(init=False)
    _base: Base | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.settings = {"measure": "own text", "passages": self.passages, "tokens": self.tokens, "seed": SEED}

    @property
    def count(self) -> int:
        """How many items it has."""
        return self.passages

    def bind(self, base: str) -> None:
        """Name the base, by a digest of all that it is."""
        self.settings = {**self.settings, "base": base}

    @property
    def asked(self) -> bool:
        """Whether the base was asked."""
        return self._base is not None

    def ask(self, base: LanguageModel, known: Scores | None, advance: Advance) -> Scores:
        """Let the base write the passages, unless they are known, and remember what it predicts on them.

        Raises:
            CheckpointError: the base cannot write, or has no head that can be asked.
            OptionError: its chat template fails, or memory runs out.
        """
        from surgery.model.divergence import remember

        pairs = written(base, self.passages, self.tokens, SEED, advance) if known is None else _kept(known)
        self._base = remember(base, pairs)
        items = [
            {"context": context, "tokens": tokens, "text": base.tokenizer.decode(tokens)} for context, tokens in pairs
        ]
        weights = np.array([len(tokens) for _, tokens in pairs], np.float64)
        return Scores(self.kind, np.zeros(len(pairs)), weights, items)

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model; a passage is an item, and weighs as many tokens as it has.

        Raises:
            OptionError: there is no base to compare with.
        """
        from surgery.model.divergence import divergences

        if self._base is None:
            raise OptionError(f"{NAME} compares a model with its base: use `surgery compare`, or give another measure.")
        places = picked(range(len(self._base.pairs)), only)
        values = divergences(model, self._base, places, advance)
        weights = np.array([len(self._base.pairs[place][1]) for place in places], np.float64)
        return Scores(self.kind, values, weights)


def written(base: LanguageModel, count: int, most: int, seed: int, advance: Advance) -> list[Pair]:
    """Passages of a model: what is given, and the tokens that it wrote.

    Args:
        count: passages, of which half are answers where there is a chat template.
        most: tokens of a passage, at most.
        seed: of the first draw; the two next numbers are taken, too.
    """
    from surgery.model.generation import sample

    begin = [prefix(base.tokenizer, base.folder)]
    room = most if base.length is None else min(most, base.length // 2)
    opened = open_turn(base.tokenizer)
    chats = count // 2 if opened else 0
    plain = sample(base, [begin] * (count - chats), room, seed, advance)
    pairs = [(begin, tokens) for tokens in plain]
    if opened is None:
        return pairs
    question_room = min(QUESTION, room // 2)
    asked = sample(base, [opened] * chats, question_room, seed + 1, advance)
    ends = {end_of_turn(base.tokenizer), base.tokenizer.eos_token_id}
    questions = [
        str(base.tokenizer.decode([token for token in tokens if token not in ends], skip_special_tokens=True)).strip()
        for tokens in asked
    ]
    prompts = [
        prompt_ids(base.tokenizer, [{"role": "user", "content": question}], base.folder) for question in questions
    ]
    left = room if base.length is None else min(room, base.length - max(map(len, prompts)))
    return pairs + list(zip(prompts, sample(base, prompts, left, seed + 2, advance), strict=True))


def _kept(known: Scores) -> list[Pair]:
    """The passages that were kept with the base's own scores."""
    return [(list(item["context"]), list(item["tokens"])) for item in known.items]
