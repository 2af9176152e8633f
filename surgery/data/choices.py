"""Multiple-choice records, as they come in many field names -> {"context", "choices", "answer"}."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from surgery.errors import OptionError

CONTEXTS = ("ctx", "context", "query")  # go on with a choice as they stand
QUESTIONS = ("question", "goal")
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answer", "answerKey", "label", "gold", "answer_idx")


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether a record is a multiple-choice question."""
    return any(name in record for name in CHOICES)


def question(where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a question: {"context", "choices", "answer"}.

    Choices are a list, or the hub's {"text": […], "label": […]}, or {label: text}. The answer is an index from 0, a label (a
    letter from A where there are none), or the choice itself.

    Raises:
        OptionError: a field is missing or wrong.
    """
    choices, labels = _choices(where, record)
    name = next((name for name in ANSWERS if record.get(name) is not None), None)
    if name is None:
        raise OptionError(
            f"{where}: has no field with the answer ({', '.join(ANSWERS)}). Correct or remove the record."
        )
    answer = _index(record[name], choices, labels)
    if answer is None:
        raise OptionError(
            f"{where}: the {name} {str(record[name])[:40]!r} is none of its {len(choices)} choices. Correct or remove the record."
        )
    return {"context": _context(where, record), "choices": choices, "answer": answer}


def filled(where: str, record: Mapping[str, Any], name: str) -> str:
    """The text of a field, without blanks around it.

    Raises:
        OptionError: it holds none.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"{where}: field {name} holds no text. Correct or remove the record.")
    return value.strip()


def _context(where: str, record: Mapping[str, Any]) -> str:
    asked = next((name for name in QUESTIONS if record.get(name) is not None), None)
    before = next((name for name in CONTEXTS if record.get(name) is not None), None)
    if asked is None and before is None:
        wanted = ", ".join(QUESTIONS + CONTEXTS)
        raise OptionError(
            f"{where}: has choices but no field with a question ({wanted}). Rename the field that has it."
        )
    text = filled(where, record, before) if before else ""
    if asked is None:
        return text
    return f"{text}{chr(10) if text else ''}Question: {filled(where, record, asked)}\nAnswer:"


def _choices(where: str, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The choices and their labels."""
    name = next((name for name in CHOICES if record.get(name) is not None), None)
    if name is None:
        raise OptionError(f"{where}: has no field with choices ({', '.join(CHOICES)}). Correct or remove the record.")
    value = record[name]
    texts, labels = value, None
    if isinstance(value, Mapping):
        hub = isinstance(value.get("text"), list)
        texts, labels = (value["text"], value.get("label")) if hub else (list(value.values()), list(value))
    if labels is None:
        labels = [*ascii_uppercase, *map(str, range(26, len(texts)))][: len(texts)] if isinstance(texts, list) else []
    sound = isinstance(texts, list) and len(texts) > 1 and isinstance(labels, list) and len(labels) == len(texts)
    if not sound or not all(isinstance(text, str) and text.strip() for text in texts):
        raise OptionError(f"{where}: field {name} is no list of two or more texts. Correct or remove the record.")
    return [text.strip() for text in texts], [str(label) for label in labels]


def _index(answer: Any, choices: list[str], labels: list[str]) -> int | None:
    """Which choice an answer means; None where it means none."""
    if isinstance(answer, str):
        text = answer.strip()
        for known in (labels, choices):
            if text in known:
                return known.index(text)
        if not (text.isascii() and text.isdigit()):
            return None
        answer = int(text[:9])
    if isinstance(answer, bool) or not isinstance(answer, int):
        return None
    return answer if 0 <= answer < len(choices) else None
