"""Which tokens each format of data trains on, against renderings written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import END, IDS, ids, make_model, write

from surgery.data.rows import ALPACA, ALPACA_INPUT, read
from surgery.errors import CheckpointError, OptionError
from surgery.train.data import hold_out, replayed
from surgery.train.encode import IGNORED, Encoder
from surgery.train.libraries import heard
from surgery.train.model import load_model, load_tokenizer, open_model
from surgery.train.settings import Settings

USER, ASSISTANT = IDS["<user>"], IDS["<assistant>"]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("user", "w1 w2"), turn("assistant", "w3"), turn("user", "w4"), turn("assistant", "w5 w6")]
FIRST = [USER, *ids("w1 w2"), END]
SECOND = [*FIRST, ASSISTANT, *ids("w3"), END, USER, *ids("w4"), END]
# name -> record, what is found, [(ids of the prompt, ids that are learnt)]
FORMATS: dict[str, tuple[dict[str, Any], str, list[tuple[list[int], list[int]]]]] = {
    "question": (
        {"question": "w1 w2", "answer": "w3", "id": 7},
        "question–answer (question, answer)",
        [([IDS["Question:"], *ids("w1 w2"), IDS["Answer:"]], [*ids("w3"), END])],
    ),
    "pair": (
        {"prompt": "w1 w2 ", "completion": "w3 w4"},
        "prompt–completion (prompt, completion)",
        [(ids("w1 w2"), [*ids("w3 w4"), END])],
    ),
    "pair of chats": (
        {"prompt": [turn("user", "w1 w2")], "completion": [turn("assistant", "w3")]},
        "prompt–completion (prompt, completion)",
        [([*FIRST, ASSISTANT], [*ids("w3"), END])],
    ),
    "instruction": (
        {"instruction": "w1 w2", "input": "", "output": "w3"},
        "instruction (instruction, output)",
        [(ids(ALPACA.format(instruction="w1 w2")), [*ids("w3"), END])],
    ),
    "instruction with input": (
        {"instruction": "w1 {w2}", "input": "w4", "output": "w3"},
        "instruction (instruction, output, input)",
        [(ids(ALPACA_INPUT.format(instruction="w1 {w2}", input="w4")), [*ids("w3"), END])],
    ),
    "text": ({"text": "w1 w2 w3"}, "plain text (text)", [([], [*ids("w1 w2 w3"), END])]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("formats") / "model")


def prepared(model: Path, file: Path, **more: Any) -> tuple[list[dict[str, list[int]]], Any]:
    """The rows that the trainer would learn from, and the trainer."""
    from surgery.train.trainer import Objective, build

    settings = Settings(model=str(model), data=(str(file),), out=Path("out"), max_steps=1, batch_size=1, **more)
    fields = {"prompt": settings.prompt_field, "completion": settings.completion_field}
    data = read(str(file), task=settings.task, whole=True, **fields)
    opened = open_model(str(model))
    tokenizer = load_tokenizer(model, chat=data.chat)
    rows: list[Any] = data.rows
    if settings.task == "sft":
        rows = Encoder(tokenizer, model, settings.completion_only)(rows)
    with heard(lambda _: None):
        trainer = build(
            settings,
            load_model(opened, "float32"),
            tokenizer,
            rows,
            [],
            reference=load_model(opened, "float32") if settings.task == "dpo" else None,
            holds=(),
            objective=Objective(),
            folder=file.with_suffix(".states"),
            processes=1,
            seed=0,
            epochs=1.0,
            advance=lambda *_: None,
        )
    return list(trainer.train_dataset), trainer


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_these_tokens_and_learns_those(model: Path, tmp_path: Path, name: str) -> None:
    record, sentence, expected = FORMATS[name]
    file = write(tmp_path / "a.jsonl", [record])
    assert sentence in read(str(file)).sentence()
    rows, _ = prepared(model, file)
    found = [(row["input_ids"], row["labels"]) for row in rows]
    assert found == [(prompt + answer, [-100] * len(prompt) + answer) for prompt, answer in expected]


def test_prompts_are_learnt_when_asked(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "w1 w2 ", "completion": "w3"}])
    (row,), _ = prepared(model, file, completion_only=False)
    assert row["labels"] == row["input_ids"] == [*ids("w1 w2 w3"), END]


def test_fields_can_be_named(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"frage": "w1 ", "antwort": "w2", "text": "w9"}])
    (row,), _ = prepared(model, file, prompt_field="frage", completion_field="antwort")
    assert (row["input_ids"], row["labels"]) == ([*ids("w1 w2"), END], [-100, *ids("w2"), END])
    (row,), _ = prepared(model, file, completion_field="antwort")
    assert row["labels"] == [*ids("w2"), END]


def test_the_renderings_are_these() -> None:
    assert ALPACA.format(instruction="A").splitlines()[2:] == ["### Instruction:", "A", "", "### Response:"]
    assert ALPACA_INPUT.format(instruction="A", input="B").splitlines()[2:] == [
        *("### Instruction:", "A", "", "### Input:", "B", "", "### Response:")
    ]


def test_question_and_answer_are_put_together_like_this(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}])
    assert read(str(file)).rows == [{"prompt": "Question: Why?\nAnswer:", "completion": " So."}]


def test_every_kind_of_file_holds_the_same(tmp_path: Path) -> None:
    import json

    import pyarrow
    import pyarrow.parquet

    records = [{"question": f"w{n}", "answer": "w1"} for n in range(5)]
    lines = write(tmp_path / "a.jsonl", records)
    (tmp_path / "list.json").write_text(" \n" + json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text(lines.read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = read(str(lines)).rows
    assert len(expected) == 5
    for name in ("list.json", "lines.json", "a.parquet"):
        assert read(str(tmp_path / name)).rows == expected


def test_preferences_give_a_prompt_and_two_answers(model: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3 w4"}])
    (row,), _ = prepared(model, plain, task="dpo")
    assert row["prompt_ids"] == ids("w1")
    assert (row["chosen_ids"], row["rejected_ids"]) == ([*ids("w2"), END], [*ids("w3 w4"), END])
    # The prompt of UltraFeedback: a string, and the first message of both chats.
    chats = {key: [turn("user", "w1"), turn("assistant", word)] for key, word in (("chosen", "w2"), ("rejected", "w3"))}
    (row,), _ = prepared(model, write(tmp_path / "b.jsonl", [{"prompt": "w1", **chats}]), task="dpo")
    assert row["prompt_ids"] == [USER, *ids("w1"), END, ASSISTANT]
    assert (row["chosen_ids"], row["rejected_ids"]) == ([*ids("w2"), END], [*ids("w3"), END])


def test_long_rows_are_cut_and_counted(model: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": "w1 ", "completion": "w2"},  # 3 tokens
        {"prompt": "w1 ", "completion": "w2 w3 w4"},  # exactly 5
        {"prompt": "w1 ", "completion": "w2 w3 w4 w5"},  # 6: cut
        {"prompt": "w1 w2 w3 w4 w5 ", "completion": "w6"},  # nothing of the answer is left
    ]
    file = write(tmp_path / "a.jsonl", records)
    rows, trainer = prepared(model, file, seq_len=5)
    assert trainer.cut == {"train": (1, 1)}
    assert [row["input_ids"] for row in rows] == [
        [*ids("w1 w2"), END],
        [*ids("w1 w2 w3 w4"), END],
        ids("w1 w2 w3 w4 w5"),
    ]
    with pytest.raises(OptionError, match="every prompt alone fills `seq_len` 5"):
        prepared(model, write(tmp_path / "b.jsonl", records[3:]), seq_len=5)


def test_packing_fills_sequences_and_keeps_the_answers(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": f"w{n} ", "completion": "w70 w71"} for n in range(6)])
    rows, _ = prepared(model, file, seq_len=8, packing=True)
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 8]
    assert all(row["labels"] == [-100, *ids("w70 w71"), END] * 2 for row in rows)
    assert sorted(row["input_ids"][index] for row in rows for index in (0, 4)) == ids("w0 w1 w2 w3 w4 w5")


BAD: dict[str, str] = {
    '{"question": "w1", "answer": "w2"}\n\n{"question": "w1", "solution": "w2"}\n': (
        r"line 3: has no field answer \(fields found: question, solution\)"
    ),
    '{"question": "w1", "answer": "w2"}\n{"question": "w1", "answer": 3}\n': "line 2: field answer holds no text \\(int\\)",
    '{"title": "w1"}\n': "line 1: fields found: title; known are messages",
    '{"messages": "w1"}\n': "line 1: field messages is no list of messages",
    '{"messages": [{"role": "user", "content": "w1"}]}\n': "line 1: no message of role assistant",
    "[1]\n": "record 1: is no record with fields",
    '{"text": \n': "line 1 is not JSON",
    "": "holds no record",
    "[]": "holds no record",
}


@pytest.mark.parametrize("content", BAD)
def test_data_that_cannot_be_used_is_explained(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(OptionError, match=BAD[content]) as caught:
        read(str(file))
    assert "a.json" in str(caught.value)


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("w1")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n')
    for name, complaint in (
        ("a.csv", "is read from .jsonl"),
        ("b.parquet", "Parquet"),
        ("c.jsonl", "not UTF-8"),
        ("d.jsonl", "no such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(OptionError, match=complaint):
            read(str(tmp_path / name))


def test_chats_need_a_template(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", template=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        load_tokenizer(model, chat=True)
    assert load_tokenizer(model, chat=False).eos_token == "</s>"


def test_held_out_rows_are_not_trained_on() -> None:
    rows = [{"text": str(n)} for n in range(20)]
    kept, held_out = hold_out(rows, 0.1, seed=3)
    assert len(held_out) == 2
    assert sorted(row["text"] for row in kept + held_out) == sorted(row["text"] for row in rows)
    assert hold_out(rows, 0.1, seed=3) == (kept, held_out)
    assert hold_out(rows, 0.0, seed=3) == (rows, [])
    with pytest.raises(OptionError, match="leaves none"):
        hold_out(rows[:1], 0.1, seed=0)


def test_a_share_of_what_is_remembered_is_replayed_and_no_row_twice() -> None:
    memory = [{"text": str(n)} for n in range(40)]
    drawn = replayed(memory, 0.1, seed=0)
    assert len(drawn) == len({row["text"] for row in drawn}) == 4
    assert replayed(memory, 0.1, seed=1) != drawn
    assert replayed(memory, 1.0, seed=0) == memory
    assert replayed([], 0.1, seed=0) == []


def test_a_chat_is_one_sequence_of_which_all_answers_are_learnt(model: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]}]
    )
    assert "2 records, 3 answers, chat messages (messages)" in read(str(file), whole=True).sentence()
    rows, trainer = prepared(model, file)
    whole = [*SECOND, ASSISTANT, *ids("w5 w6"), END]
    assert [row["input_ids"] for row in rows] == [whole, whole]
    learnt = [IGNORED] * len(whole)
    learnt[-3:] = whole[-3:]
    assert rows[1]["labels"] == learnt
    at = len(FIRST) + 1
    learnt[at : at + 2] = [*ids("w3"), END]
    assert rows[0]["labels"] == learnt
    assert trainer.cut == {"train": (0, 0)}
    (row,), _ = prepared(model, write(tmp_path / "b.jsonl", [{"messages": CHAT}]), completion_only=False)
    assert row["labels"] == whole


def test_the_masks_are_those_of_a_template_that_marks_what_the_assistant_says(model: Path) -> None:
    """transformers' own assistant masks, by the keyword generation, which TRL's `assistant_only_loss` asks for."""
    tokenizer = load_tokenizer(model, chat=True)
    turns = [*CHAT, turn("user", "w7"), turn("assistant", "w8")]
    (found,) = Encoder(tokenizer, model, True)([{"messages": turns, "answers": [1, 3, 5]}])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
        "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
    )
    marked: Any = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == marked["input_ids"]
    assert [label != IGNORED for label in found["labels"]] == [bool(mask) for mask in marked["assistant_masks"]]


def test_a_template_that_shows_an_answer_otherwise_once_more_follows_gives_a_row_for_each(model: Path) -> None:
    tokenizer = load_tokenizer(model, chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {% if loop.last and m['role'] == 'assistant' %}w79 {% endif %}"
        "{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    encoder = Encoder(tokenizer, model, True)
    rows = encoder([{"messages": CHAT, "answers": [1, 3]}])
    thought = ids("w79")
    assert encoder.parted == 1
    assert [row["input_ids"] for row in rows] == [
        [*FIRST, ASSISTANT, *thought, *ids("w3"), END],
        [*SECOND, ASSISTANT, *thought, *ids("w5 w6"), END],
    ]
    assert [sum(label != IGNORED for label in row["labels"]) for row in rows] == [3, 4]
