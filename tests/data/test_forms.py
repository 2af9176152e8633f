"""Records of SQuAD, WikiQA, QASC, TRACE and FLAN and multiple choice, as their data sets have them, as rows and as questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.data.rows import Data, read
from surgery.errors import OptionError
from surgery.evaluation.measures import find_measures
from surgery.evaluation.measures.choices import MultipleChoice

SQUAD = {
    "id": "1",
    "title": "Ducks",
    "context": "Ducks lay eggs.",
    "question": "What do ducks lay?",
    "answers": {"text": ["eggs", "Eggs", "eggs"], "answer_start": [10, 10, 10]},
}
WIKIQA = [
    {"question_id": "Q1", "question": "What lays?", "document_title": "D", "answer": answer, "label": label}
    for answer, label in (("Ducks lay.", 1), ("A cave.", 0), ("Hens lay.", 1))
]
QASC = {
    "id": "3",
    "question": "What lays eggs?",
    "choices": {"text": ["rocks", "ducks"], "label": ["A", "B"]},
    "answerKey": "B",
    "fact1": "Birds lay eggs.",
    "formatted_question": "What lays eggs? (A) rocks (B) ducks",
}
ROWS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SQuAD": (
        SQUAD,
        {"prompt": "Ducks lay eggs.\n\nQuestion: What do ducks lay?\nAnswer:", "completion": " eggs"},
    ),
    "WikiQA": (WIKIQA[0], {"prompt": "Question: What lays?\nAnswer:", "completion": " Ducks lay."}),
    "QASC": (
        QASC,
        {"prompt": "Question: What lays eggs? (A) rocks (B) ducks\nAnswer:", "completion": " ducks"},
    ),
    "TRACE": (
        {"prompt": "Is it dovish?\nAnswer:", "answer": "A"},
        {"prompt": "Is it dovish?\nAnswer:", "completion": "A"},
    ),
    "FLAN": (
        {"inputs": "Does it follow?", "targets": "yes", "task": "rte"},
        {"prompt": "Does it follow?", "completion": " yes"},
    ),
    "multiple choice": (
        {"ctx": "A duck", "endings": ["lays.", "flies away."], "label": "1", "ind": 4},
        {"prompt": "A duck", "completion": " flies away."},
    ),
}


def read_records(folder: Path, *records: dict[str, Any]) -> Data:
    return read(str(write(folder, *records)))


def write(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_read_as_it_comes(tmp_path: Path, form: str) -> None:
    record, row = ROWS[form]
    found = read_records(tmp_path, record)
    assert (found.kind, found.rows) == (form, [row])
    assert form in found.sentence()


def test_flan_puts_no_second_blank_between(tmp_path: Path) -> None:
    (row,) = read_records(tmp_path, {"inputs": "Translate: a\n\n", "targets": "b"}).rows
    assert row == {"prompt": "Translate: a\n\n", "completion": "b"}


def test_other_right_answers_of_squad_and_wikiqa_are_known(tmp_path: Path) -> None:
    assert read_records(tmp_path, SQUAD).others == {0: ("Eggs",)}
    found = read_records(tmp_path, *WIKIQA)
    assert [row["completion"] for row in found.rows] == [" Ducks lay.", " Hens lay."]
    assert found.others == {0: ("Hens lay.",), 1: ("Ducks lay.",)}
    assert "Left out: 1 without a right answer." in found.sentence()


def test_a_question_that_nothing_answers_is_left_out(tmp_path: Path) -> None:
    nothing = {**SQUAD, "answers": {"text": [], "answer_start": []}}
    found = read_records(tmp_path, nothing, SQUAD)
    assert (len(found.rows), found.wrong, found.others) == (1, 1, {0: ("Eggs",)})
    with pytest.raises(OptionError, match="no record has a right answer"):
        read_records(tmp_path, nothing)


def test_qasc_is_chosen_among_or_written_as_the_metric_says(tmp_path: Path) -> None:
    file = str(write(tmp_path, QASC))
    (chosen,) = find_measures([file])
    assert isinstance(chosen, MultipleChoice)
    assert chosen.questions == [
        {"context": "Question: What lays eggs?\nAnswer:", "choices": ["rocks", "ducks"], "answer": 1}
    ]
    (written,) = find_measures([f"{file}:rouge-l"])
    assert getattr(written, "questions", None) == [
        ("Question: What lays eggs? (A) rocks (B) ducks\nAnswer:", ["ducks"])
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**SQUAD, "answers": "eggs"}, "answers has no list of texts"),
        ({**SQUAD, "answers": {"text": [3]}}, "answers holds no text"),
        ({**WIKIQA[0], "label": "yes"}, "label is neither 0 nor 1"),
        ({**QASC, "answerKey": "C"}, "is none of its 2 choices"),
        ({"inputs": 3, "targets": "b"}, "inputs holds no text"),
    ],
)
def test_a_record_that_is_not_in_its_form_is_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=rf"data\.json, record 1: .*{said}"):
        read_records(tmp_path, record)
