"""Names and numbers as text: nothing in them commands a terminal or a spreadsheet, and programs read back what was there."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.text import brief, count, csv_lines, dumps, duration, fixed, number, readable, share, size, words

ANY = st.text(st.characters(codec=None))  # surrogates too
BAD = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@given(ANY)
def test_what_is_readable_has_no_control_character_and_is_one_line(text: str) -> None:
    shown = readable(text)
    assert not {unicodedata.category(mark) for mark in shown} & BAD
    assert len(shown.splitlines()) <= 1
    assert readable(shown) == shown


def test_plain_names_stay_as_they_are() -> None:
    for name in ("model.layers.0.mlp.up_proj.weight", "模型/Größe [bold]x[/] é", "C:\\models", ""):
        assert readable(name) == name


@given(
    st.recursive(
        ANY | st.integers() | st.booleans() | st.none(), lambda held: st.lists(held) | st.dictionaries(ANY, held)
    )
)
def test_json_holds_the_very_text_and_no_control_character(document: Any) -> None:
    content = dumps(document).decode()
    assert json.loads(content) == document
    assert not {unicodedata.category(mark) for mark in content if mark != "\n"} & BAD


def test_json_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        dumps({"a": float("nan")})


@given(ANY)
def test_a_cell_is_no_formula(text: str) -> None:
    content = csv_lines([(text, -1.5, None)]).decode()
    ((cell, value, nothing),) = csv.reader(io.StringIO(content))
    assert cell.strip()[:1] not in tuple("=+-@＝＋－＠") or not cell.strip()
    assert cell.removeprefix("'") == readable(text).removeprefix("'")
    assert (value, nothing) == ("-1.5", "")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "＝1", "\t=1", "\r=1"])
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    ((cell,),) = csv.reader(io.StringIO(csv_lines([(text,)]).decode()))
    assert cell == ("'" if text[0] not in "\t\r" else "") + readable(text)


def test_a_command_keeps_its_line_breaks() -> None:
    assert words(["surgery", "--prompt", "a\nb\x1b"]) == "surgery --prompt 'a\nb\\x1b'"


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (share(0.98765), "98.8%"),
        (share(0.98765, 2), "98.77%"),
        (share(-0.01), "−1.0%"),
        (share(None), "–"),
        (number(2.3456), "2.346"),
        (number(23.456), "23.46"),
        (number(234.56), "234.6"),
        (number(2345.6), "2,346"),
        (number(1e5), "1.00e+05"),
        (number(-0.0001), "0.000"),
        (number(float("inf")), "–"),
        (fixed(0.12345), "0.1235"),
        (fixed(None), "–"),
        (brief(0), "0"),
        (brief(0.00012345), "1.2e-04"),
        (brief(123.456), "123"),
        (count(12_345_678), "12.3M"),
        (count(999), "999"),
        (size(1_234_567), "1.2 MB"),
        (duration(3.14), "3.1 seconds"),
        (duration(150), "2.5 minutes"),
        (duration(9000), "2.5 hours"),
    ],
)
def test_numbers(shown: str, text: str) -> None:
    assert shown == text
