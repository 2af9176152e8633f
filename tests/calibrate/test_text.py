"""Samples of calibration text, with tokenizers that are built here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from surgery.calibrate.text import READ_FACTOR, samples
from surgery.errors import CheckpointError, HubError, OptionError

WORDS = ["<unk>", "<s>", "</s>", "user:", "bot:", *(f"w{n}" for n in range(80))]
UNKNOWN, BEGIN, END, USER, BOT = range(5)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} </s>{% endfor %}"

Make = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """A folder with a configuration and a word-level tokenizer."""

    def make(*, begin: bool = False, template: str | None = None, family: str = "llama", positions: int = 64) -> Path:
        words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        if begin:
            words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
        build: Any = PreTrainedTokenizerFast
        tokenizer = build(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = template
        folder = tmp_path / "model"
        tokenizer.save_pretrained(folder)
        config = FAMILIES[family].build().config
        config.max_position_embeddings = positions
        config.save_pretrained(folder)
        return folder

    return make


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + n) % 80}" for n in range(count))


def ids(first: int, count: int) -> list[int]:
    return [5 + (first + n) % 80 for n in range(count)]


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_documents_are_joined_by_the_end_of_text_and_cut_without_padding(model: Make, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": words(0, 7)}, {"text": words(20, 6)}, {"text": words(40, 5)}])
    tokens, description = samples(file, model(), count=5, length=10)
    stream = [*ids(0, 7), END, *ids(20, 6), END, *ids(40, 5)]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [stream[:10], stream[10:]]
    assert description["notes"] == [f"{file} holds 20 tokens: 2 samples instead of 5."]
    assert (description["samples"], description["length"], description["tokens_read"]) == (2, 10, 20)


def test_what_the_tokenizer_adds_to_a_document_stays(model: Make, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": words(0, 3)}, {"text": words(20, 3)}])
    tokens, _ = samples(file, model(begin=True), count=1, length=9)
    assert tokens.tolist() == [[BEGIN, *ids(0, 3), END, BEGIN, *ids(20, 3)]]


def test_windows_do_not_overlap_and_depend_on_the_seed_alone(model: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(words(11 * line, 11) for line in range(20)))
    folder = model()
    stream = [token for line in range(20) for token in ids(11 * line, 11)]
    seen = set()
    for seed in range(8):
        tokens, description = samples(str(tmp_path / "a.txt"), folder, count=6, length=17, seed=seed)
        again, same = samples(str(tmp_path / "a.txt"), folder, count=6, length=17, seed=seed)
        assert torch.equal(tokens, again)
        assert description == same
        assert tokens.shape == (6, 17)
        position = 0
        for row in tokens.tolist():  # each is found behind the one before it
            while stream[position : position + 17] != row:
                position += 1
                assert position <= len(stream) - 17
            position += 17
        seen.add(description["tokens_sha256"])
    assert len(seen) == 8


def test_windows_fall_everywhere_in_the_text(model: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 80))
    folder = model()
    firsts = {
        int(samples(str(tmp_path / "a.txt"), folder, count=1, length=60, seed=seed)[0][0, 0]) for seed in range(60)
    }
    assert {5, 25} <= firsts  # the first and the last window that fit
    assert len(firsts) > 12


def test_a_long_text_is_one_document_and_only_as_much_is_read_as_is_needed(model: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(words(line, 80) for line in range(2000)))
    tokens, description = samples(str(tmp_path / "a.txt"), model(), count=8, length=50)
    assert END not in tokens
    assert READ_FACTOR * 8 * 50 <= description["tokens_read"] < 40_000
    bad = write(tmp_path / "b.jsonl", [{"text": words(0, 80)}] * 100)
    with Path(bad).open("a") as file:
        file.write("not JSON, but never read")
    samples(bad, model(), count=8, length=50)


def test_chat_messages_go_through_the_chat_template(model: Make, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": words(0, 2)}, {"role": "bot", "content": words(9, 1)}]
    file = write(tmp_path / "a.jsonl", [{"messages": chat, "id": 1}, {"messages": chat, "id": 2}])
    tokens, _ = samples(file, model(begin=True, template=TEMPLATE), count=1, length=14)
    one = [USER, *ids(0, 2), END, BOT, *ids(9, 1), END]
    assert tokens.tolist() == [one + one]  # no second end, no begin: the template's word is final
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(OptionError, match="no chat template"):
        samples(file, model(), count=1, length=4)


def test_every_kind_of_file_gives_the_same_samples(model: Make, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"id": n, "body": words(7 * n, 30)} for n in range(10)]
    lines = write(tmp_path / "a.jsonl", records)
    (tmp_path / "list.json").write_text("  " + json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text(Path(lines).read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    folder = model()
    first, description = samples(lines, folder, count=3, length=40, text_field="body")
    for name in ("list.json", "lines.json", "a.parquet"):
        tokens, other = samples(str(tmp_path / name), folder, count=3, length=40, text_field="body")
        assert torch.equal(tokens, first)
        assert other["tokens_sha256"] == description["tokens_sha256"]


@pytest.mark.parametrize(("family", "positions", "length"), [("llama", 12, 12), ("roberta", 12, 11), ("llama", 64, 20)])
def test_a_sample_is_no_longer_than_the_model_takes(
    model: Make, tmp_path: Path, family: str, positions: int, length: int
) -> None:
    (tmp_path / "a.txt").write_text(words(0, 80))
    tokens, description = samples(
        str(tmp_path / "a.txt"), model(family=family, positions=positions), count=1, length=20
    )
    assert tokens.shape == (1, length)
    assert bool(description["notes"]) == (length < 20)


BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "w1"}\n\n{"text": \n', "line 3 is not JSON"),
    ("a.jsonl", b'{"body": "w1", "title": "w2"}\n', "`text_field`: body, title"),
    ("a.jsonl", b'{"text": 7}\n', "neither text nor chat messages"),
    ("a.jsonl", b"[1, 2]\n", "no record with fields"),
    ("a.jsonl", b"", "holds 0 tokens"),
    ("a.txt", b"w1 w2 w3", "holds 3 tokens, fewer than one sample of 10"),
    ("a.txt", b"w1 \xff\xfe", "is not UTF-8"),
    ("a.json", b"[" * 100_000, "is not JSON"),
    ("a.parquet", b"PAR1 and no more", "Parquet"),
    ("a.csv", b"w1", "is read from .txt"),
]


@pytest.mark.parametrize(("name", "content", "complaint"), BAD)
def test_text_that_cannot_be_used_is_explained(
    model: Make, tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=complaint) as caught:
        samples(str(tmp_path / name), model(), count=1, length=10)
    assert name in str(caught.value)


def test_what_is_missing_is_named(model: Make, tmp_path: Path) -> None:
    folder = model()
    with pytest.raises(OptionError, match="no such file"):
        samples(str(tmp_path / "b.jsonl"), folder)
    with pytest.raises(OptionError, match="is a folder"):
        samples(str(tmp_path), folder)
    with pytest.raises(OptionError, match="no field b"):
        samples(write(tmp_path / "a.jsonl", [{"text": "w1"}]), folder, text_field="b")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        samples(str(tmp_path / "a.jsonl"), folder)


def test_a_data_set_of_the_hub_is_streamed(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, str]]:
        asked.append((args, kwargs))
        if args[0] == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return ({"text": words(n, 40)} for n in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder = model()
    tokens, _ = samples("org/name:en", folder, count=2, length=30)
    assert tokens.shape == (2, 30)
    assert asked == [(("org/name", "en"), {"split": "train", "streaming": True})]
    with pytest.raises(HubError, match=r"org/none: is no file, and cannot be fetched .*DatasetNotFoundError"):
        samples("org/none", folder)


def test_a_parquet_file_may_hold_more_than_text(model: Make, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [b"x" * 1000] * 30, "text": [words(n, 30) for n in range(30)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert samples(str(tmp_path / "a.parquet"), model(), count=2, length=30)[0].shape == (2, 30)
    with pytest.raises(OptionError, match=r"no field body.*image, text"):
        samples(str(tmp_path / "a.parquet"), model(), text_field="body")
