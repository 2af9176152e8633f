"""Rows -> token ids and labels, which the trainer takes as they are, whatever kind of data they come from.

A chat is one sequence, and all answers of the assistant in it are learnt (open-instruct, which the papers follow). Where an
answer begins and ends is found by rendering the chat as far as to it, and as far as behind it. A template that renders an answer
otherwise once more follows (Qwen3 drops its thoughts) has no such sequence: then each answer is a row, with all before it as its
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.data.encode import learnt, prompt_ids, rendered_ids, rendered_text
from surgery.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not learnt
# input_ids and labels, of a sequence.
Encoded = dict[str, list[int]]


@dataclass
class Encoder:
    """Makes token ids of rows.

    Attributes:
        answers_only: learn completions and answers, not prompts.
        parted: chats that became a row an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    answers_only: bool
    parted: int = field(default=0, init=False)

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """Encode rows of `surgery.data.rows.read`, in their order.

        Raises:
            CheckpointError, OptionError: the tokenizer has no chat template, or it does not take the messages.
        """
        return [one for row in rows for one in self._encoded(row)]

    def _encoded(self, row: Row) -> list[Encoded]:
        if "input_ids" in row:
            return [row]
        if "messages" in row:
            whole = self._conversation(row)
            if whole is not None:
                return [whole]
            self.parted += 1
            return [self._plain(answer) for answer in answers(row)]
        return [self._plain(row)]

    def _plain(self, row: Row) -> Encoded:
        given, found = learnt(self.tokenizer, row, self.folder)
        ids = given + found
        return {"input_ids": ids, "labels": self._labels(ids, [] if "text" in row else [range(len(given), len(ids))])}

    def _labels(self, ids: list[int], spans: Sequence[range]) -> list[int]:
        if not spans or not self.answers_only:
            return list(ids)
        kept = {place for span in spans for place in span}
        return [token if place in kept else IGNORED for place, token in enumerate(ids)]

    def _conversation(self, row: Row) -> Encoded | None:
        """A chat as one sequence; None where the template renders a part of it otherwise than the part alone."""
        turns, tools = row["messages"], row.get("tools")
        whole = rendered_ids(self.tokenizer, turns, self.folder, tools=tools)
        text = rendered_text(self.tokenizer, turns, self.folder, tools=tools)
        spans = []
        for at in row["answers"]:
            shown = turns[: at + 1]
            if not text.startswith(rendered_text(self.tokenizer, shown, self.folder, tools=tools)):
                return None
            asked = prompt_ids(self.tokenizer, turns[:at], self.folder, tools=tools)
            begin = same(asked, whole)
            end = same(rendered_ids(self.tokenizer, shown, self.folder, tools=tools), whole)
            spans.append(range(begin, end))
        return {"input_ids": whole, "labels": self._labels(whole, spans)}


def answers(row: Row) -> list[Row]:
    """The answers of a chat that are learnt, each as a row with all before it as its prompt."""
    turns: list[Any] = row["messages"]
    shared = {"tools": row["tools"]} if "tools" in row else {}
    return [{"prompt": turns[:at], "completion": [turns[at]], **shared} for at in row["answers"]]


def same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
