"""Records -> rows of prompt and completion, text, or prompt, chosen and rejected: the columns that TRL's trainers take.

    messages                          chat; each answer of the assistant is a row, with all before it as its prompt
    prompt, completion                strings, put together as they are, or lists of chat messages
    instruction, (input,) output      the prompt of Stanford Alpaca
    question, answer                  "Question: …\\nAnswer:" and " …"
    text                              trained on as a whole
    prompt, chosen, rejected          preferences (--task dpo); prompt may be part of chosen and rejected where these are chats

The first record decides which of them a file is, and every other must have its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.data.records import records
from surgery.errors import OptionError

Row = dict[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MESSAGES = "chat messages"
FIELDS = {
    MESSAGES: ("messages",),
    "prompt–completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question–answer": ("question", "answer"),
    "plain text": ("text",),
}
PREFERENCES = {"preferences": ("prompt", "chosen", "rejected"), "chat preferences": ("chosen", "rejected")}


@dataclass(frozen=True)
class Data:
    """What a file holds.

    Attributes:
        kind: the format, for people.
        fields: that it was read from.
        rows: in TRL's columns; more than `records` where chats have several answers.
    """

    name: str
    kind: str
    fields: tuple[str, ...]
    rows: list[Row]
    records: int

    @property
    def chat(self) -> bool:
        """Whether a chat template is needed."""
        return any(isinstance(value, list) for value in self.rows[0].values())

    def sentence(self) -> str:
        """What was found, in a line."""
        answers = f", {len(self.rows):,} answers" if len(self.rows) != self.records else ""
        return f"{self.name}: {self.records:,} records{answers}, {self.kind} ({', '.join(self.fields)})."


def read(name: str, *, task: str = "sft", prompt: str | None = None, completion: str | None = None) -> Data:
    """Read training data.

    Args:
        name: a file or a data set on the hub.
        task: "sft" or "dpo".
        prompt, completion: fields that hold them; a completion alone is plain text.

    Raises:
        OptionError, HubError: it cannot be read, is empty, or a record lacks a field.
    """
    rows: list[Row] = []
    kind, fields, count = "", tuple[str, ...](), 0
    for where, record in records(name):
        if not isinstance(record, Mapping):
            raise OptionError(
                f'{where}: is no record with fields. Give records such as {{"question": …, "answer": …}}.'
            )
        if not count:
            kind, fields = _kind(where, record, task, prompt, completion)
        for field in fields:
            if record.get(field) is None:
                raise OptionError(
                    f"{where}: has no field {field} (fields found: {_found(record)}). Correct or remove the record, or name "
                    "the fields with `prompt_field` and `completion_field`."
                )
        rows += _rows(where, record, kind, fields)
        count += 1
    if not count:
        raise OptionError(f"{name}: holds no record. Check the file.")
    return Data(name, kind, fields, rows, count)


def _kind(
    where: str, record: Mapping[str, Any], task: str, prompt: str | None, completion: str | None
) -> tuple[str, tuple[str, ...]]:
    if prompt is not None and completion is not None:
        return "prompt–completion", (prompt, completion)
    if completion is not None:
        return "plain text", (completion,)
    kinds = PREFERENCES if task == "dpo" else FIELDS
    for kind, fields in kinds.items():
        if all(record.get(field) is not None for field in fields):
            if kind == "preferences" and isinstance(record["chosen"], list) and isinstance(record["prompt"], str):
                continue  # the prompt is in chosen and rejected again, as a message
            return kind, fields
    wanted = "; ".join(", ".join(fields) for fields in kinds.values())
    way = "Rename them" if task == "dpo" else "Name them with `prompt_field` and `completion_field`"
    raise OptionError(f"{where}: fields found: {_found(record)}; known are {wanted}. {way}.")


def _rows(where: str, record: Mapping[str, Any], kind: str, fields: tuple[str, ...]) -> list[Row]:
    values = [record[field] for field in fields]
    if kind == MESSAGES:
        return _answers(where, values[0])
    if kind in PREFERENCES or kind == "prompt–completion":
        columns = fields if kind in PREFERENCES else ("prompt", "completion")
        chat = isinstance(values[0], list)
        check: Callable[[str, str, Any], Any] = _messages if chat else _text
        return [
            {column: check(where, field, value) for column, field, value in zip(columns, fields, values, strict=True)}
        ]
    texts = [_text(where, field, value) for field, value in zip(fields, values, strict=True)]
    if kind == "plain text":
        return [{"text": texts[0]}]
    if kind == "question–answer":
        return [{"prompt": f"Question: {texts[0]}\nAnswer:", "completion": f" {texts[1]}"}]
    context = _text(where, "input", record.get("input") or "")
    template = ALPACA_INPUT if context else ALPACA
    return [{"prompt": template.format(instruction=texts[0], input=context), "completion": texts[1]}]


def _answers(where: str, value: Any) -> list[Row]:
    turns = _messages(where, "messages", value)
    rows = [
        {"prompt": turns[:index], "completion": [turn]}
        for index, turn in enumerate(turns)
        if turn["role"] == "assistant" and index
    ]
    if not rows:
        raise OptionError(f"{where}: no message of role assistant follows another one. Correct or remove the record.")
    return rows


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(
            f"{where}: field {field} holds no text ({type(value).__name__}). Correct or remove the record."
        )
    return value


def _messages(where: str, field: str, value: Any) -> list[dict[str, str]]:
    whole = isinstance(value, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )
    if not whole or not value:
        raise OptionError(
            f"{where}: field {field} is no list of messages with a role and a content of text. Correct or remove the record."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _found(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"
