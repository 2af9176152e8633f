"""What a file is measured by, and each measure's numbers against transformers' own, one text at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_lm import LENGTH, TEXT, hf_loss, ignore, make_lm, make_tokenizer, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread

from surgery.data.choices import question
from surgery.data.encode import learnt, parts
from surgery.data.rows import read
from surgery.errors import CheckpointError, OptionError
from surgery.evaluation.measures import find_measures
from surgery.evaluation.measures.answer_loss import AnswerLoss
from surgery.evaluation.measures.choices import MinimalPairs, MultipleChoice
from surgery.evaluation.measures.generated import Generated
from surgery.evaluation.measures.harness_options import HarnessOptions
from surgery.evaluation.measures.perplexity import Perplexity
from surgery.evaluation.scores import Measure
from surgery.model.language_model import LanguageModel

USER = {"role": "user", "content": "How many ducks?"}
ASSISTANT = {"role": "assistant", "content": "Four ducks."}
ASKED = [{"question": f"How many ducks lay {n} eggs?", "answer": f"{n} ducks. #### {n}"} for n in range(1, 6)]
CHOICES: list[dict[str, Any]] = [
    {"question": "How many?", "choices": ["Four ducks", "The good sentence", "12"], "answer": 2},
    {"question": "What sells?", "choices": {"text": ["eggs", "every day"], "label": ["1", "2"]}, "answerKey": "1"},
    {"ctx": "The bad sentence", "endings": ["is not.", "lay 12 eggs every day?", "and"], "label": "0"},
]
GOOD, BAD = "The good sentence is the likelier one.", "The bad sentence is not."


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def one(spec: Path | str, **options: Any) -> Any:
    (measure,) = find_measures([str(spec)], **options)
    return measure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm(tmp_path_factory.mktemp("measures") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return open_lm(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return reference(folder)


def test_perplexity_is_that_of_transformers_over_full_windows(tmp_path: Path, model: LanguageModel, plain: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4)
    tokens = model.tokenizer(TEXT * 4).input_ids
    found = one(file, limit=3, seq_len=16).score(model, ignore)
    losses = []
    for start in (0, 16, 32):
        ids = torch.tensor([tokens[start : start + 16]])
        with torch.inference_mode():
            losses.append(float(plain(input_ids=ids, labels=ids).loss))
    assert found.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert found.values.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.weights.tolist() == [15.0] * 3
    whole = one(file, seq_len=16).score(model, ignore)
    assert whole.weights.sum() == len(tokens) - len(whole.weights)
    assert whole.weights[-1] == (len(tokens) - 1) % 16


def test_documents_are_joined_by_the_end_of_the_text_and_read_as_far_as_needed(
    tmp_path: Path, model: LanguageModel, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.tokenizer
    file = write(tmp_path / "a.jsonl", [{"text": "Four ducks"}, {"text": TEXT * 20}])
    stream = [*encode("Four ducks").input_ids, 1, *encode(TEXT * 20).input_ids]
    expected = [hf_loss(plain, stream[at : at + 1], stream[at + 1 : at + 20]) for at in range(0, 100, 20)]
    for characters in (1, 16):  # what is looked at is too short at first, or not
        monkeypatch.setattr("surgery.evaluation.measures.perplexity.CHARACTERS", characters)
        found = one(file, limit=5, seq_len=20).score(model, ignore)
        assert found.values.tolist() == pytest.approx(expected, rel=1e-5)


def test_windows_are_no_longer_than_the_model_takes(tmp_path: Path, model: LanguageModel) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4)
    found = one(file).score(model, ignore)
    assert found.weights[0] == LENGTH - 1
    assert found.extra == {"seq_len": LENGTH}


ROWS = {
    "question": ASKED[0],
    "prompt ends with a blank": {"prompt": "How many ", "completion": "ducks lay eggs?"},
    "prompt that merges": {"prompt": "How man", "completion": "y ducks"},
    "ended already": {"prompt": "How", "completion": " many</s>"},
    "instruction": {"instruction": "Sell them", "input": "eggs", "output": "each"},
    "chat": {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    "text": {"text": TEXT},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bos", [False, True])
def test_rows_become_the_tokens_that_training_learns(tmp_path: Path, name: str, bos: bool) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read(str(write(tmp_path / "a.jsonl", [ROWS[name]]))).rows
    tokenizer = make_tokenizer(bos=bos)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="text" not in rows[0])
    config = SFTConfig(str(tmp_path / "out"), max_length=None, use_cpu=True, bf16=False)
    made = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, config, False, None, "train")
    for row, ours in zip(made, (learnt(tokenizer, row, tmp_path) for row in rows), strict=True):
        assert [*ours[0], *ours[1]] == row["input_ids"]
        scored = [label for label in row["labels"][1:] if label != -100]
        assert ours[1] == scored


def test_answer_loss_is_that_of_transformers(tmp_path: Path, model: LanguageModel, plain: Any) -> None:
    found = one(write(tmp_path / "a.jsonl", ASKED)).score(model, ignore)
    assert found.kind == "loss"
    encode = model.tokenizer
    for record, loss, weight in zip(ASKED, found.values, found.weights, strict=True):
        context = encode(f"Question: {record['question']}\nAnswer:").input_ids
        answer = [*encode(f" {record['answer']}").input_ids, 1]
        assert weight == len(answer)
        assert loss == pytest.approx(hf_loss(plain, context, answer), rel=1e-5)
    assert found.items[0]["completion"] == " 1 ducks. #### 1"


def likelihood(plain: Any, context: list[int], continuation: list[int]) -> float:
    return -hf_loss(plain, context, continuation) * len(continuation)


@pytest.mark.parametrize("metric", [None, "acc_norm"])
def test_the_likeliest_choice_is_chosen(tmp_path: Path, model: LanguageModel, plain: Any, metric: str | None) -> None:
    contexts = ["Question: How many?\nAnswer:", "Question: What sells?\nAnswer:", "The bad sentence"]
    texts = [["Four ducks", "The good sentence", "12"], ["eggs", "every day"], CHOICES[2]["endings"]]
    found = one(write(tmp_path / "a.jsonl", CHOICES), metric=metric).score(model, ignore)
    for context, choices, right, item, value in zip(contexts, texts, (2, 0, 0), found.items, found.values, strict=True):
        sums = [
            likelihood(plain, model.tokenizer(context).input_ids, model.tokenizer(f" {text}").input_ids)
            for text in choices
        ]
        assert item["log_likelihoods"] == pytest.approx(sums, rel=1e-5)
        scaled = [total / (len(text) if metric else 1) for total, text in zip(sums, choices, strict=True)]
        assert item["chosen"] == scaled.index(max(scaled))
        assert value == float(item["chosen"] == right)


def test_length_decides_between_acc_and_acc_norm(tmp_path: Path, model: LanguageModel) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "How?", "choices": ["12", TEXT[:70]], "answer": 0}])
    assert one(file, metric="acc").score(model, ignore).value == 1.0
    assert one(file, metric="acc_norm").score(model, ignore).value == 0.0


@pytest.mark.parametrize("bos", [False, True])
def test_the_likelier_sentence_of_a_pair_is_found(tmp_path: Path, bos: bool) -> None:
    folder = make_lm(tmp_path / "a", bos=bos)
    model, plain = open_lm(folder), reference(folder)
    pairs = [(GOOD, BAD), (BAD, GOOD), ("eggs", "every eggs"), (GOOD, GOOD)]
    file = write(tmp_path / "a.jsonl", [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs])
    found = one(file).score(model, ignore)
    first = [0 if bos else 1]
    for (good, bad), value, item in zip(pairs, found.values, found.items, strict=True):
        sums = [likelihood(plain, first, model.tokenizer(text).input_ids) for text in (good, bad)]
        assert item["log_likelihoods"] == pytest.approx(sums, rel=1e-5)
        assert value == float(good != bad and sums[0] > sums[1])


def test_generated_answers_are_compared_and_kept(tmp_path: Path, model: LanguageModel, plain: Any) -> None:
    file = write(tmp_path / "a.jsonl", [*ASKED, {"question": "So", "answer": "x"}])
    said = []
    for record in [*ASKED, {"question": "So"}]:
        ids = torch.tensor([model.tokenizer(f"Question: {record['question']}\nAnswer:").input_ids])
        output = plain.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=1)
        said.append(model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    write(file, [{"question": r["question"], "answer": said[n] if n else "else"} for n, r in enumerate(ASKED)])
    found = one(file, metric="exact", max_new_tokens=10).score(model, ignore)
    assert [item["generated"] for item in found.items] == said[:5]
    assert found.values.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert found.items[0]["reference"] == "else"


def test_a_chat_is_asked_through_the_template(tmp_path: Path, model: LanguageModel) -> None:
    measure = one(write(tmp_path / "a.jsonl", [{"messages": [USER, ASSISTANT]}]), metric="rouge-l", max_new_tokens=4)
    assert measure.stop is None
    found = measure.score(model, ignore)
    assert found.items[0]["prompt"] == [USER]
    assert found.items[0]["reference"] == "Four ducks."


def test_the_best_of_several_right_answers_counts(tmp_path: Path, model: LanguageModel, plain: Any) -> None:
    ids = torch.tensor([model.tokenizer("Ducks lay.\n\nQuestion: How many?\nAnswer:").input_ids])
    output = plain.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=1)
    said = str(model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    asked = {"context": "Ducks lay.", "question": "How many?"}
    records = [{**asked, "answers": {"text": texts}} for texts in (["no", said, "none"], ["no", "none"])]
    for metric in ("em", "f1"):
        found = one(write(tmp_path / "squad.jsonl", records), metric=metric, max_new_tokens=6).score(model, ignore)
        assert found.values.tolist() == [1.0, 0.0]
        assert [item["reference"] for item in found.items] == ["no", "no"]
        assert found.items[0]["references"] == ["no", said, "none"]


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    measure = one(write(tmp_path / "a.jsonl", [{"messages": [USER, ASSISTANT]}]))
    with pytest.raises(CheckpointError, match="chat template"):
        measure.score(open_lm(folder), ignore)


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    context, continuation = parts(tokenizer, "The good ", "sentence", tmp_path)
    assert tokenizer.decode(context) == "The good"
    assert tokenizer.decode(continuation) == " sentence"
    assert parts(tokenizer, " ", "eggs", tmp_path) == ([1], tokenizer(" eggs").input_ids)


# records of a file, the metric, what it becomes
KINDS: list[tuple[list[Any], str | None, type]] = [
    ([{"text": TEXT}], None, Perplexity),
    ([{"text": TEXT}], "loss", AnswerLoss),
    (ASKED, None, AnswerLoss),
    (ASKED, "numeric", Generated),
    (ASKED, "rouge-l", Generated),
    (CHOICES, None, MultipleChoice),
    (CHOICES, "acc_norm", MultipleChoice),
    ([{"sentence_good": "a", "sentence_bad": "b"}], None, MinimalPairs),
    ([{"sentence_good": "a", "sentence_bad": "b"}], "acc", MinimalPairs),
    ([{"messages": [USER, ASSISTANT]}], None, AnswerLoss),
]


@pytest.mark.parametrize(("records", "metric", "kind"), KINDS)
def test_the_first_record_decides_the_measure(
    tmp_path: Path, records: list[Any], metric: str | None, kind: type
) -> None:
    file = write(tmp_path / "a.jsonl", records)
    assert type(one(file, metric=metric)) is kind
    if metric:
        assert type(one(f"{file}:{metric}")) is kind


def test_fields_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"frage": "a", "antwort": "b", "choices": ["c", "d"]}])
    assert one(file, prompt_field="frage", completion_field="antwort").rows == [{"prompt": "a", "completion": "b"}]
    assert one(file, completion_field="antwort").documents == ["b"]


def test_settings_are_of_the_items_scored_and_the_lengths(tmp_path: Path) -> None:
    five, six = write(tmp_path / "a.jsonl", ASKED), write(tmp_path / "b.jsonl", [*ASKED, ASKED[0]])

    def settings(file: Path, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = one(file, **options).settings
        return found

    assert settings(five) == settings(six, limit=5) != settings(six)
    assert settings(five) != settings(five, limit=4)
    exact = settings(five, metric="exact")
    assert exact == settings(six, metric="exact", limit=5)
    assert exact != settings(five, metric="rouge-l") != settings(five)
    assert exact != settings(five, metric="exact", max_new_tokens=5)
    text = write(tmp_path / "c.jsonl", [{"text": TEXT}])
    assert settings(text) != settings(text, seq_len=100)
    assert settings(text) != settings(text, limit=2)
    choices = write(tmp_path / "d.jsonl", CHOICES)
    assert settings(choices) != settings(choices, metric="acc_norm")
    assert json.loads(json.dumps(exact)) == exact


def test_a_sample_is_drawn_from_what_is_not_too_long(tmp_path: Path, model: LanguageModel) -> None:
    rows = [{"question": f"w{n}", "answer": "w2 " * (1 + n % 2)} for n in range(20)]
    file = write(tmp_path / "a.jsonl", rows)
    short = one(file, max_chars=len("Question: w10\nAnswer: w2 ")).rows
    assert [row["completion"] for row in short] == [" w2 "] * 10
    drawn = one(file, sample=5)
    assert len(drawn.rows) == 5
    assert drawn.rows == one(file, sample=5).rows != one(file, limit=5).rows
    assert drawn.rows == [row for row in one(file).rows if row in drawn.rows]  # in their order
    assert len(one(file, sample=50).rows) == 20
    assert len(one(write(tmp_path / "b.jsonl", CHOICES), sample=2).questions) == 2
    text = one(write(tmp_path / "c.jsonl", [{"text": TEXT * 5}]), seq_len=8, sample=3).score(model, ignore)
    starts = [item["first_token"] for item in text.items]
    assert starts == sorted(starts) != [0, 8, 16]
    for options, said in (
        ({"limit": 1, "sample": 1}, "Leave one of the two out"),
        ({"max_chars": 3}, "every row has more than 3 characters"),
    ):
        with pytest.raises(OptionError, match=said):
            one(file, **options)


def names(measures: list[Measure]) -> list[str]:
    return [measure.name for measure in measures]


def test_words_name_files_folders_and_metrics_and_names_differ(tmp_path: Path) -> None:
    first, second = write(tmp_path / "gsm" / "test.jsonl", ASKED), write(tmp_path / "arc" / "test.jsonl", CHOICES)
    other = write(tmp_path / "comma,s" / "b.jsonl", ASKED)
    assert names(find_measures([f"{first}, {second.parent}"])) == ["gsm/test", "arc/test"]
    # No comma splits a path that is there.
    assert names(find_measures([str(first), str(other.parent)])) == ["gsm/test", "b"]
    assert names(find_measures([f"{first},{second}", f"{other}:loss"])) == ["gsm/test", "arc/test", "b"]
    assert names(find_measures([f"{first}:loss, {first}:numeric"])) == ["gsm/test:loss", "gsm/test:numeric"]
    with pytest.raises(OptionError, match="twice"):
        find_measures([str(first), str(first)])


def test_a_metric_may_stand_before_a_comma(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ASKED), write(tmp_path / "b.jsonl", CHOICES)
    found: Any = find_measures([f"{first}:exact,{second}"])
    assert names(found) == ["a", "b"]
    assert found[0].metric == "exact"


def test_many_words_with_commas_are_no_file_name_that_is_too_long(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{'long' * 20}{number}.jsonl", ASKED) for number in range(80)]
    assert len(find_measures([",".join(map(str, files))])) == 80
    with pytest.raises(OptionError, match="no such file"):
        find_measures([f"{'x' * 300}.jsonl"])
    with pytest.raises(OptionError, match="no such file"):
        find_measures(["~nobody-of-that-name/a.jsonl"])


@pytest.mark.parametrize("spec", ["", ",", " , "])
def test_a_word_that_names_nothing_is_refused(spec: str) -> None:
    with pytest.raises(OptionError, match="names no file and no task"):
        find_measures([spec])


@pytest.mark.parametrize("ending", ["jsonl", "json", "txt"])
def test_files_as_windows_saves_them_hold_the_same(tmp_path: Path, ending: str) -> None:
    texts = {
        "jsonl": "".join(json.dumps(record) + "\n" for record in ASKED),
        "json": json.dumps(ASKED, indent=1),
        "txt": TEXT,
    }
    plain, windows = tmp_path / f"plain.{ending}", tmp_path / f"windows.{ending}"
    plain.write_text(texts[ending])
    windows.write_bytes(texts[ending].replace("\n", "\r\n").encode("utf-8-sig"))
    assert one(windows).settings == one(plain).settings


def test_a_text_without_text_is_refused_before_any_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(OptionError, match=r"blank\.txt: holds no text"):
        find_measures([str(tmp_path / "blank.txt")])


def test_other_words_are_tasks_of_the_harness_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int | None]] = []

    def harness_measures(tasks: list[tuple[str, HarnessOptions]], *, limit: int | None, **_: Any) -> list[Any]:
        asked.append(([task for task, _ in tasks], limit))
        return [SimpleNamespace(name=task) for task, _ in tasks]

    from surgery.evaluation.measures import harness

    monkeypatch.setattr(harness, "harness_measures", harness_measures)
    file, task = write(tmp_path / "gsm" / "mmlu.jsonl", ASKED), tmp_path / "mine.yaml"
    task.write_text("task: mine")
    found = find_measures([f"mmlu,arc:easy,{file}", str(task)], limit=3)
    assert names(found) == ["mmlu", "arc:easy", "gsm/mmlu", str(task)]
    assert asked == [(["mmlu", "arc:easy"], 3), ([str(task)], 3)]
    with pytest.raises(OptionError, match="`metric` exact is for files"):
        find_measures(["mmlu"], metric="exact")


# records, options, what the sentence says
BROKEN: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {}, r"a\.jsonl"),
    ([*ASKED, {"question": "?"}], {}, r"a\.jsonl, line 6"),
    ([*ASKED, 5], {}, r"a\.jsonl, line 6"),
    ([*CHOICES, 5], {}, r"a\.jsonl, line 4"),
    ([{"what": "?"}], {}, r"a\.jsonl, line 1"),
    ([{"question": "?", "choices": ["a", "b"]}], {}, "line 1: has no field with the answer"),
    ([{"question": "?", "choices": ["a", "b"], "answer": 2}], {}, "the answer '2' is none of its 2"),
    ([{"question": "?", "choices": ["a", "b"], "answer": True}], {}, "the answer 'True' is none"),
    ([{"question": "?", "choices": ["a", "b"], "answer": -1}], {}, "the answer '-1' is none"),
    ([{"question": "?", "choices": ["a", "b"], "answer": "9" * 5000}], {}, "is none of its 2"),
    ([{"question": "?", "choices": ["a"], "answer": 0}], {}, "choices is no list of two"),
    ([{"question": "?", "choices": ["a", " "], "answer": 0}], {}, "choices is no list of two"),
    ([{"question": "?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answer": 0}], {}, "choices is no list"),
    ([{"choices": ["a", "b"], "answer": 0}], {}, "no field with a question"),
    ([{"question": 3, "choices": ["a", "b"], "answer": 0}], {}, "question holds no text"),
    ([{"sentence_good": "a", "sentence_bad": None}], {}, "line 1: field sentence_bad holds no text"),
    (ASKED, {"metric": "acc"}, "acc needs the fields choices, options, endings or sentence_good"),
    (ASKED, {"metric": "perplexity"}, "needs running text"),
    ([{"text": TEXT}], {"metric": "exact"}, "needs questions and answers"),
    ([{"question": "?", "answer": "none"}], {"metric": "numeric"}, "answer 1 has no number"),
    ([{"question": "?", "answer": "?!"}], {"metric": "rouge-l"}, "answer 1 has no word"),
    ([{"question": "?", "answer": "\ud800"}], {}, "half of a character"),
    (ASKED, {"metric": "bleu"}, "`metric` bleu is unknown"),
    (ASKED, {"limit": 0}, "`limit` must be 1 or more"),
    (ASKED, {"seq_len": 1}, "`seq_len` must be 2 or more"),
    (ASKED, {"max_new_tokens": 0}, "`max_new_tokens` must be 1"),
]


@pytest.mark.parametrize(("records", "options", "said"), BROKEN)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    tmp_path: Path, records: list[Any], options: dict[str, Any], said: str
) -> None:
    file = write(tmp_path / "a.jsonl", records)
    with pytest.raises(OptionError, match=said):
        find_measures([str(file)], **options)


def test_a_path_that_is_no_data_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty").mkdir()
    file = write(tmp_path / "a.jsonl", ASKED)
    for spec, said in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "a.csv", r"a\.csv: is no"),
        (tmp_path / "latin.txt", "not UTF-8"),
        (tmp_path / "empty", "folder without"),
        (f"{file}:bleu", "bleu is no metric"),
        (f"{file}:", "no metric"),
    ):
        with pytest.raises(OptionError, match=said):
            find_measures([str(spec)])


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("1", 1), ("B", 1), (" B ", 1), ("two", 1), ("0", 0), ("A", 0)])
def test_an_answer_is_an_index_a_letter_or_the_choice(answer: Any, index: int) -> None:
    assert question("here", {"goal": "?", "options": ["one", "two"], "gold": answer})["answer"] == index


def test_labels_come_before_indices() -> None:
    record = {"question": "?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"}
    assert question("here", record)["answer"] == 0
    letters = {"context": "It rains.", "question": "?", "options": {"A": "a", "B": "b"}, "answer": "b"}
    assert question("here", letters) == {
        "context": "It rains.\nQuestion: ?\nAnswer:",
        "choices": ["a", "b"],
        "answer": 1,
    }


def test_nothing_heavy_is_imported_to_find_measures(tmp_path: Path) -> None:
    import subprocess
    import sys

    file = write(tmp_path / "a.jsonl", ASKED)
    code = (
        "import sys; from surgery.evaluation.measures import find_measures; "
        f"find_measures([{str(file)!r}]); print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
