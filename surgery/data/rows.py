"""Records -> rows of prompt and completion, text, or prompt, chosen and rejected: the columns that TRL's trainers take.

    messages                          chat; each answer of the assistant is a row, with all before it as its prompt
    conversations                     the same as ShareGPT has it: from and value, or role and content
    prompt, completion                strings, put together as they are, or lists of chat messages
    instruction, (input,) output      the prompt of Stanford Alpaca; with system and history, the earlier turns before it
    question, answer                  "Question: …\\nAnswer:" and " …"
    text                              trained on as a whole
    of SQuAD, WikiQA, QASC, TRACE and FLAN, and multiple choice: see `surgery.data.forms`
    prompt, chosen, rejected          preferences (--task dpo); prompt may be part of chosen and rejected where these are chats

A chat may have `tools`, and its messages reasoning_content, tool_calls and what else the chat template knows; a message with
`train` false or `weight` 0 is given, not learnt. The first record decides which kind a file is, and every other must have its
fields. Fields that are not used are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.data.forms import FORMS, question_row, text
from surgery.data.forms import Row as Row
from surgery.data.records import records
from surgery.errors import OptionError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MESSAGES, SHAREGPT, INSTRUCTION = "chat messages", "ShareGPT", "instruction"
FIELDS = {
    MESSAGES: ("messages",),
    SHAREGPT: ("conversations",),
    "prompt–completion": ("prompt", "completion"),
    INSTRUCTION: ("instruction", "output"),
    **{form.name: form.fields for form in FORMS.values()},
    "question–answer": ("question", "answer"),
    "plain text": ("text",),
}
# Fields beside those that decide, which are used where a record has them.
MORE = {MESSAGES: ("tools",), SHAREGPT: ("tools", "system"), INSTRUCTION: ("input", "system", "history")}
# What ShareGPT and its like call the speakers -> the role.
ROLES = {
    **dict.fromkeys(("human", "user", "question", "input"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "assistant", "bot", "bing", "bard", "model", "answer", "output", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
# What a message may have beside its role and content that a chat template looks at.
PARTS = ("reasoning_content", "thinking", "reasoning", "tool_calls", "tool_call_id", "name")
# What marks a message of a chat as learnt or not.
MARKS = ("weight", "train", "learn")
PREFERENCES = {"preferences": ("prompt", "chosen", "rejected"), "chat preferences": ("chosen", "rejected")}


@dataclass(frozen=True)
class Data:
    """The rows of a file.

    Attributes:
        kind: the format, for people.
        fields: that it was read from.
        rows: in TRL's columns; more than `records` where chats have several answers.
        unused: how many records have each field that is not used; of messages, "messages: weight".
        wrong: records that are left out since they have no right answer.
        long: rows that are left out since they are too long.
        drawn: some of the others were drawn at random.
        others: by the number of a row, from 0, further answers that are as right as its completion.
    """

    name: str
    kind: str
    fields: tuple[str, ...]
    rows: list[Row]
    records: int
    unused: Mapping[str, int] = field(default_factory=dict)
    wrong: int = 0
    long: int = 0
    drawn: bool = False
    others: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """Whether a chat template is needed."""
        return any(isinstance(value, list) for value in self.rows[0].values())

    def sentence(self) -> str:
        """Summarise the rows in a line."""
        count = self.long + sum(len(row["answers"]) if "answers" in row else 1 for row in self.rows)
        answers = f", {count:,} answers" if count != self.records else ""
        if self.drawn:
            answers = f", {len(self.rows):,} drawn"
        left = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
        gone = [f"{self.wrong:,} without a right answer"] * bool(self.wrong) + [f"{self.long:,} too long"] * bool(
            self.long
        )
        return (
            f"{self.name}: {self.records:,} records{answers}, {self.kind} ({', '.join(self.fields)})."
            + (f" Left out: {', '.join(gone)}." if gone else "")
            + (f" Not used: {left}." if left else "")
        )


def read(
    name: str, *, task: str = "sft", prompt: str | None = None, completion: str | None = None, whole: bool = False
) -> Data:
    """Read training data.

    Args:
        name: a file or a data set on the hub.
        task: "sft" or "dpo".
        prompt, completion: fields that hold them; a completion alone is plain text.
        whole: a chat is one row of `messages` and `answers`, the positions of those to be learnt, not a row for each answer.

    Raises:
        OptionError, HubError: it cannot be read, is empty, or a record lacks a field.
    """
    rows: list[Row] = []
    kind, fields, count = "", tuple[str, ...](), 0
    unused, more = dict[str, int](), dict[str, None]()
    others, wrong = dict[int, tuple[str, ...]](), 0
    for where, record in records(name):
        if not isinstance(record, Mapping):
            raise OptionError(
                f'{where}: is no record with fields. Give records such as {{"question": …, "answer": …}}.'
            )
        if not count:
            kind, fields = _kind(where, record, task, prompt, completion)
        for wanted in fields:
            if record.get(wanted) is None:
                raise OptionError(
                    f"{where}: has no field {wanted} (fields found: {_found(record)}). Correct or remove the record, or name "
                    "the fields with `prompt_field` and `completion_field`."
                )
        if kind not in FORMS:
            rows += _rows(where, record, kind, fields, whole)
        elif (made := FORMS[kind].make(where, record)) is not None:
            others |= {len(rows): made.others} if made.others else {}
            rows.append(made.row)
        else:
            wrong += 1
        more |= {extra: None for extra in MORE.get(kind, ()) if record.get(extra)}
        for left in _unused(record, kind, fields):
            unused[left] = unused.get(left, 0) + 1
        count += 1
    if not count:
        raise OptionError(f"{name}: holds no record. Check the file.")
    if not rows and wrong:
        raise OptionError(f"{name}: no record has a right answer. Give another file.")
    if not rows:
        raise OptionError(
            f"{name}: every answer is marked as not to be learnt. Check weight and train of its messages."
        )
    if kind in FORMS and FORMS[kind].shared:
        others = _shared(rows)
    return Data(name, kind, (*fields, *more), rows, count, unused, wrong, others=others)


def _shared(rows: list[Row]) -> dict[int, tuple[str, ...]]:
    """Of each row, the completions of the other rows with the same prompt."""
    answers = dict[str, list[str]]()
    for row in rows:
        answers.setdefault(row["prompt"], []).append(row["completion"].strip())
    found = {number: [*answers[row["prompt"]]] for number, row in enumerate(rows) if len(answers[row["prompt"]]) > 1}
    for number, same in found.items():
        same.remove(rows[number]["completion"].strip())
    return {number: tuple(same) for number, same in found.items()}


def _kind(
    where: str, record: Mapping[str, Any], task: str, prompt: str | None, completion: str | None
) -> tuple[str, tuple[str, ...]]:
    if prompt is not None and completion is not None:
        return "prompt–completion", (prompt, completion)
    if completion is not None:
        return "plain text", (completion,)
    kinds = PREFERENCES if task == "dpo" else FIELDS
    for kind, fields in kinds.items():
        named = FORMS[kind].named if kind in FORMS else None
        if named is not None and (found := named(record)) is not None:
            return kind, found
        if named is None and all(record.get(field) is not None for field in fields):
            if kind == "preferences" and isinstance(record["chosen"], list) and isinstance(record["prompt"], str):
                continue  # the prompt is in chosen and rejected again, as a message
            return kind, fields
    wanted = "; ".join(", ".join(fields) for fields in kinds.values())
    way = "Rename them" if task == "dpo" else "Name them with `prompt_field` and `completion_field`"
    raise OptionError(f"{where}: fields found: {_found(record)}; known are {wanted}. {way}.")


def _rows(where: str, record: Mapping[str, Any], kind: str, fields: tuple[str, ...], whole: bool) -> list[Row]:
    values = [record[field] for field in fields]
    if kind in (MESSAGES, SHAREGPT):
        turns = _sharegpt(where, record, values[0]) if kind == SHAREGPT else values[0]
        return _answers(where, fields[0], turns, record.get("tools"), whole)
    if kind in PREFERENCES or kind == "prompt–completion":
        columns = fields if kind in PREFERENCES else ("prompt", "completion")
        chat = isinstance(values[0], list)
        check: Callable[[str, str, Any], Any] = _messages if chat else text
        return [
            {column: check(where, field, value) for column, field, value in zip(columns, fields, values, strict=True)}
        ]
    texts = [text(where, field, value) for field, value in zip(fields, values, strict=True)]
    if kind == "plain text":
        return [{"text": texts[0]}]
    if kind == "question–answer":
        return [question_row(texts[0], texts[1])]
    context = text(where, "input", record.get("input") or "")
    template = ALPACA_INPUT if context else ALPACA
    preamble, turn, form = template.partition("### ")
    asked = (turn + form).format(instruction=texts[0], input=context)
    return [{"prompt": _before(where, record, preamble) + asked, "completion": texts[1]}]


def _before(where: str, record: Mapping[str, Any], preamble: str) -> str:
    """The text before an instruction: the system prompt in place of Alpaca's own, and the earlier turns."""
    system, history = text(where, "system", record.get("system") or ""), record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not pairs:
        raise OptionError(
            f"{where}: field history is no list of pairs of a question and its answer. Correct the record."
        )
    turns = [[text(where, "history", part) for part in turn] for turn in history]
    earlier = "".join(f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n" for asked, answer in turns)
    return (f"{system}\n\n" if system else preamble) + earlier


def _sharegpt(where: str, record: Mapping[str, Any], value: Any) -> Any:
    """The messages of a ShareGPT conversation, with the record's system prompt first."""
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise OptionError(f"{where}: field conversations is no list of messages. Correct or remove the record.")
    turns = []
    for turn in value:
        speaker = turn.get("from", turn.get("role"))
        role = ROLES.get(str(speaker).strip().lower())
        if role is None:
            raise OptionError(
                f"{where}: conversations has a message from {speaker!r}; known are {', '.join(ROLES)}. Rename it."
            )
        rest = {name: part for name, part in turn.items() if name not in ("from", "value", "role")}
        turns.append({**rest, "role": role, "content": turn.get("value", turn.get("content"))})
    if record.get("system"):
        turns.insert(0, {"role": "system", "content": record["system"]})
    return turns


def _answers(where: str, name: str, value: Any, tools: Any, whole: bool) -> list[Row]:
    turns = _messages(where, name, value)
    shared = {"tools": _tools(where, tools)} if tools else {}
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index]
    if not answers:
        raise OptionError(f"{where}: no message of role assistant follows another one. Correct or remove the record.")
    learnt = [index for index in answers if _is_learnt(value[index])]
    if whole:
        return [{"messages": turns, "answers": learnt, **shared}] if learnt else []
    return [{"prompt": turns[:index], "completion": [turns[index]], **shared} for index in learnt]


def _tools(where: str, tools: Any) -> str:
    """The tools that the assistant may call, as JSON: a list of objects."""
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise OptionError(f"{where}: field tools is no list of objects, nor JSON of one. Correct or remove the record.")
    return json.dumps(found)


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether an answer is to be learnt: not where it has a weight of 0, or train or learn that is false."""
    return not any(turn.get(name) in (0, False) and turn.get(name) is not None for name in MARKS)


def _is_mark(key: str, held: Any, turn: Mapping[str, Any], kind: str) -> bool:
    """Whether a mark has its effect: yes or no on an answer, or no on what is given anyway; other weights are not known."""
    if key not in MARKS or kind not in (MESSAGES, SHAREGPT):
        return False
    speaker = str(turn.get("from", turn.get("role"))).strip().lower()
    answers = speaker == "assistant" or (kind == SHAREGPT and ROLES.get(speaker) == "assistant")
    return held in ((0, 1) if answers else (0,))


def _messages(where: str, field: str, value: Any) -> list[dict[str, Any]]:
    """Messages with what a chat template looks at."""
    turns = value if isinstance(value, list) else []
    found: list[dict[str, Any]] = []
    for turn in turns:
        content = _content(turn.get("content")) if isinstance(turn, Mapping) else None
        if content is None and isinstance(turn, Mapping) and turn.get("tool_calls"):
            content = ""
        if content is None or not isinstance(turn.get("role"), str):
            found = []
            break
        parts = {name: turn[name] for name in PARTS if turn.get(name) not in (None, "", [])}
        found.append({"role": turn["role"], "content": content, **parts})
    if not found:
        raise OptionError(
            f"{where}: field {field} is no list of messages with a role and a content of text. Correct or remove the record."
        )
    return found


def _content(value: Any) -> str | None:
    """The text of a message; of one in parts, those of text, if it has no others."""
    if isinstance(value, list) and value:
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return value if isinstance(value, str) else None


def _unused(record: Mapping[str, Any], kind: str, fields: tuple[str, ...]) -> list[str]:
    """The fields of a record that nothing is made of, and those of its messages."""
    known = {*fields, *MORE.get(kind, ())}
    found = [name for name, value in record.items() if name not in known and value not in (None, "", [])]
    for name in fields:
        value = record.get(name)
        turns = value if isinstance(value, list) else []
        inner = {
            key
            for turn in turns
            if isinstance(turn, Mapping)
            for key, held in turn.items()
            if held not in (None, "", []) and not _is_mark(key, held, turn, kind)
        }
        used = {"role", "content", "from", "value", *PARTS}
        found += [f"{name}: {key}" for key in sorted(inner - used)]
    return found


def _found(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"
