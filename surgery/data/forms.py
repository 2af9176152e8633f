"""The records of data sets that have fields of their own -> rows of prompt and completion.

SQuAD             context, question, answers {"text": […]}: "<context>\\n\\nQuestion: …\\nAnswer:", " <first answer>"; the other
                  answers are right too; a question without an answer is left out
WikiQA            question_id, question, answer, label: the answers whose label is 1; each is right for its question
QASC              formatted_question, which has the choices in it, and the right one of choices
TRACE             prompt, answer: put together as they are
FLAN              inputs, targets: a blank between them where neither has one
multiple choice   the question as `surgery.data.choices` has it, and the right choice: the text that `acc` finds the likelihood of
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.data.choices import ANSWERS, CHOICES, CONTEXTS, QUESTIONS, is_question, question
from surgery.errors import OptionError

Row = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A row, and further answers that are as right as its completion."""

    row: Row
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        name: for people.
        fields: all of which a record in this form has.
        make: takes where a record stands and the record; returns None where it has no right answer.
        shared: rows with the same prompt are answers to one question.
        named: where the fields have several names, those that a record has; None where it is not in this form.
    """

    name: str
    fields: tuple[str, ...]
    make: Callable[[str, Mapping[str, Any]], Answered | None]
    shared: bool = False
    named: Callable[[Mapping[str, Any]], tuple[str, ...] | None] | None = None


def text(where: str, field: str, value: Any) -> str:
    """A field's value, if it is text.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, str):
        raise OptionError(
            f"{where}: field {field} holds no text ({type(value).__name__}). Correct or remove the record."
        )
    return value


def question_row(question: str, answer: str) -> Row:
    """A row of a question and its answer."""
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _squad(where: str, record: Mapping[str, Any]) -> Answered | None:
    answers = record["answers"]
    found = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(found, list):
        raise OptionError(f"{where}: field answers has no list of texts. Correct or remove the record.")
    texts = list(dict.fromkeys(text(where, "answers", one) for one in found))
    if not texts:
        return None
    row = question_row(text(where, "question", record["question"]), texts[0])
    before = text(where, "context", record["context"])
    return Answered({**row, "prompt": f"{before}\n\n{row['prompt']}"}, tuple(texts[1:]))


def _wikiqa(where: str, record: Mapping[str, Any]) -> Answered | None:
    if record["label"] not in (0, 1):
        raise OptionError(f"{where}: field label is neither 0 nor 1. Correct or remove the record.")
    if not record["label"]:
        return None
    return Answered(question_row(*(text(where, field, record[field]) for field in ("question", "answer"))))


def _qasc(where: str, record: Mapping[str, Any]) -> Answered:
    found = question(where, record)
    return Answered(
        question_row(text(where, "formatted_question", record["formatted_question"]), found["choices"][found["answer"]])
    )


def _trace(where: str, record: Mapping[str, Any]) -> Answered:
    prompt, answer = (text(where, field, record[field]) for field in ("prompt", "answer"))
    return Answered({"prompt": prompt, "completion": answer})


def _flan(where: str, record: Mapping[str, Any]) -> Answered:
    given, wanted = (text(where, field, record[field]) for field in ("inputs", "targets"))
    blank = "" if given[-1:].isspace() or wanted[:1].isspace() else " "
    return Answered({"prompt": given, "completion": f"{blank}{wanted}"})


def _choice(where: str, record: Mapping[str, Any]) -> Answered:
    found = question(where, record)
    return Answered({"prompt": found["context"], "completion": f" {found['choices'][found['answer']]}"})


def _named(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    if not is_question(record):
        return None
    try:
        question("", record)
    except OptionError:
        return None
    first = (next((name for name in names if record.get(name) is not None), None) for names in (CHOICES, ANSWERS))
    return (*(name for name in CONTEXTS + QUESTIONS if record.get(name) is not None), *(name for name in first if name))


FORMS = {
    form.name: form
    for form in (
        Form("SQuAD", ("context", "question", "answers"), _squad),
        Form("WikiQA", ("question_id", "question", "answer", "label"), _wikiqa, shared=True),
        Form("QASC", ("formatted_question", "choices", "answerKey"), _qasc),
        Form("TRACE", ("prompt", "answer"), _trace),
        Form("FLAN", ("inputs", "targets"), _flan),
        Form("multiple choice", ("question", "choices", "answer"), _choice, named=_named),
    )
}
