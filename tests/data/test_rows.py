"""Records of every kind that people have, as rows: nothing of them is dropped without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.data.rows import ALPACA, Data, read
from surgery.errors import OptionError


def read_rows(tmp_path: Path, *records: dict[str, Any], task: str = "sft") -> Data:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read(str(file), task=task)


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("who", "answers"),
    [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("Human", "GPT"), ("user", "model")],
)
def test_sharegpt_is_a_chat(tmp_path: Path, who: str, answers: str) -> None:
    turns = [(who, "2+2?"), (answers, "4"), (who, "3+3?"), (answers, "6")]
    found = read_rows(
        tmp_path, {"system": "Add.", "conversations": [{"from": role, "value": text} for role, text in turns]}
    )
    first = chat(("system", "Add."), ("user", "2+2?"))
    second = [*first, *chat(("assistant", "4"), ("user", "3+3?"))]
    assert found.rows == [
        {"prompt": first, "completion": chat(("assistant", "4"))},
        {"prompt": second, "completion": chat(("assistant", "6"))},
    ]
    assert not found.unused
    assert "ShareGPT" in found.sentence()


def test_a_speaker_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'narrator'"):
        read_rows(tmp_path, {"conversations": [{"from": "narrator", "value": "Once"}, {"from": "gpt", "value": "4"}]})


def test_history_and_system_of_alpaca_are_the_earlier_turns(tmp_path: Path) -> None:
    record = {"instruction": "And 3?", "output": "12", "system": "Add.", "history": [["2+2?", "4"], ["4+4?", "8"]]}
    (row,) = read_rows(tmp_path, record).rows
    turn = "### Instruction:\n{}\n\n### Response:\n"
    assert row["prompt"] == f"Add.\n\n{turn.format('2+2?')}4\n\n{turn.format('4+4?')}8\n\n{turn.format('And 3?')}"
    assert row["completion"] == "12"
    plain = read_rows(tmp_path, {"instruction": "And 3?", "output": "12", "history": [], "system": ""}).rows[0]
    assert plain["prompt"] == ALPACA.format(instruction="And 3?")


def test_what_a_template_looks_at_is_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "4", "reasoning_content": "easy"},
    ]
    found = read_rows(tmp_path, {"messages": turns, "tools": tools})
    assert [row["completion"] for row in found.rows] == [
        [{"role": "assistant", "content": "", "tool_calls": [call]}],
        [{"role": "assistant", "content": "4", "reasoning_content": "easy"}],
    ]
    assert all(json.loads(row["tools"]) == tools for row in found.rows)
    assert found.rows[1]["prompt"][2] == {"role": "tool", "content": "4", "tool_call_id": "1"}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"learn": False}])
def test_an_answer_that_is_not_to_be_learnt_is_only_given(tmp_path: Path, mark: dict[str, Any]) -> None:
    turns = [
        *chat(("user", "a")),
        {"role": "assistant", "content": "b", **mark},
        *chat(("user", "c"), ("assistant", "d")),
    ]
    found = read_rows(tmp_path, {"messages": turns})
    assert [row["completion"] for row in found.rows] == [chat(("assistant", "d"))]
    assert found.rows[0]["prompt"] == chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    with pytest.raises(OptionError, match="not to be learnt"):
        read_rows(tmp_path, {"messages": turns[:2]})


def test_content_in_parts_is_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    assert read_rows(tmp_path, {"messages": turns}).rows[0]["prompt"] == chat(("user", "one two"))
    turns[0]["content"] = [{"type": "image", "url": "x"}]
    with pytest.raises(OptionError, match="content of text"):
        read_rows(tmp_path, {"messages": turns})


def test_every_field_that_is_not_used_is_named_with_its_count(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "a", "mood": "good"}, {"role": "assistant", "content": "b"}]
    found = read_rows(
        tmp_path, {"messages": message, "id": 1, "score": 0.5}, {"messages": message, "id": 2}, {"messages": message}
    )
    assert found.unused == {"id": 2, "score": 1, "messages: mood": 3}
    assert found.name == str(tmp_path / "data.jsonl")
    assert found.sentence().endswith("Not used: id (2), score (1), messages: mood (3).")


@pytest.mark.parametrize(
    "mark", [(1, {"weight": 0.3}), (1, {"weight": 2}), (1, {"weight": "0"}), (0, {"train": True}), (0, {"weight": 1})]
)
def test_a_mark_that_has_no_effect_is_named(tmp_path: Path, mark: tuple[int, dict[str, Any]]) -> None:
    turns: list[dict[str, Any]] = [*chat(("user", "a"), ("assistant", "b"))]
    turns[mark[0]] |= mark[1]
    assert read_rows(tmp_path, {"messages": turns}).unused == {f"messages: {next(iter(mark[1]))}": 1}


@pytest.mark.parametrize("mark", [(1, {"weight": 0}), (1, {"train": True}), (0, {"train": False}), (0, {"weight": 0})])
def test_a_mark_that_is_followed_is_not_named(tmp_path: Path, mark: tuple[int, dict[str, Any]]) -> None:
    turns: list[dict[str, Any]] = [*chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    turns[mark[0]] |= mark[1]
    assert not read_rows(tmp_path, {"messages": turns}).unused


def test_marks_are_named_where_preferences_do_not_follow_them(tmp_path: Path) -> None:
    chosen: list[dict[str, Any]] = [*chat(("user", "a")), {"role": "assistant", "content": "b", "weight": 0}]
    pair = {"chosen": chosen, "rejected": chat(("user", "a"), ("assistant", "c"))}
    assert read_rows(tmp_path, pair, task="dpo").unused == {"chosen: weight": 1}


@pytest.mark.parametrize("tools", ["{not json", "3", [1], {"name": "add"}])
def test_tools_that_are_no_list_of_objects_are_refused(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(OptionError, match="line 1: field tools"):
        read_rows(tmp_path, {"messages": chat(("user", "a"), ("assistant", "b")), "tools": tools})
