"""The demo: its skills, its scoring, its table, and one tiny run of the whole with a stand-in for the engine."""

import importlib.abc
import io
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from surgery.demo.run import SURGERIES, Effort, demo
from surgery.demo.skills import (
    FACTS,
    NEW_SKILL,
    Item,
    Skill,
    evaluation_items,
    facts,
    general_skills,
    is_held_out,
    training_items,
)
from surgery.demo.table import Row, results_table
from surgery.errors import OutputError, SurgeryError
from surgery.methods.half_reset import choose

pytest.importorskip("transformers")

from surgery.demo.evaluate import accuracies, distance, exact_match
from surgery.demo.model import load_model, new_model, save_model
from surgery.demo.tokens import END, IGNORED, TOKEN_ID, encode, tokenizer
from surgery.demo.train import Optimizer, Schedule, adamw, half, mofo, train

TINY = Effort(pre_training_steps=3, fine_tuning_steps=2, items=10)


def _skill(name: str) -> Skill:
    return next(skill for skill in (*general_skills(0), NEW_SKILL) if skill.name == name)


def _console(width: int = 80) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width), text


def _oracle(prompt: Sequence[str]) -> list[str]:
    """The right answer, worked out from the words of the prompt alone."""
    *words, equals = prompt
    assert equals == "="
    match words:
        case ["copy", "sort", a, b, c, d]:
            return [min(a, b), max(a, b), min(c, d), max(c, d)]
        case ["copy", *rest]:
            return rest
        case ["reverse", *rest]:
            return list(reversed(rest))
        case ["sort", *rest]:
            return sorted(rest)
        case ["add", *rest]:
            return list(f"{sum(map(int, rest)):02d}")
    raise AssertionError(prompt)


@pytest.mark.parametrize("name", ["copy", "rev", "sort", "add", "pairs"])
def test_every_drawn_answer_is_the_oracles(name: str) -> None:
    rng = random.Random(5)
    for _ in range(500):
        item = _skill(name).draw(rng)
        assert list(item.answer) == _oracle(item.prompt)


def test_facts_have_distinct_keys_and_follow_the_seed() -> None:
    known = facts(0)
    assert len({item.prompt for item in known}) == len(known) == FACTS
    assert known == facts(0)
    assert known != facts(1)


@pytest.mark.parametrize("name", ["copy", "rev", "sort", "add", "pairs"])
def test_no_evaluation_prompt_is_ever_trained_on(name: str) -> None:
    skill = _skill(name)
    trained = {item.prompt for item in training_items(skill, random.Random(1), 5000)}
    asked = evaluation_items(skill, 200)
    assert len({item.prompt for item in asked}) == len(asked) > 80
    assert all(is_held_out(item) for item in asked)
    assert trained.isdisjoint(item.prompt for item in asked)


def test_about_a_tenth_of_all_sums_is_held_out() -> None:
    held_out = [is_held_out(Item(("add", *digits, "="), ())) for digits in itertools.product("0123456789", repeat=3)]
    assert 70 < sum(held_out) < 130


def test_facts_are_asked_of_the_memorised_set() -> None:
    skill = _skill("facts")
    assert set(evaluation_items(skill, 50)) <= set(facts(0))
    assert set(training_items(skill, random.Random(0), 300)) <= set(facts(0))


def test_encode_labels_the_answer_only() -> None:
    short = Item(("recall", "q", "x", "="), ("m", "b"))
    long = Item(("copy", "c", "a", "z", "d", "="), ("c", "a", "z", "d"))
    inputs, labels = encode([short, long])
    assert inputs.shape == labels.shape == (2, 10)
    ids = TOKEN_ID
    assert inputs[0].tolist() == [ids["recall"], ids["q"], ids["x"], ids["="], ids["m"], ids["b"], 0, 0, 0, 0]
    assert labels[0].tolist() == [IGNORED] * 3 + [ids["m"], ids["b"], ids[END]] + [IGNORED] * 4
    assert labels[1].tolist() == [IGNORED] * 5 + [*(ids[word] for word in "cazd"), ids[END]]


def test_the_tokenizer_writes_the_same_ids() -> None:
    line = "copy sort c a z d = a c d z"
    assert tokenizer()(line)["input_ids"] == [TOKEN_ID[word] for word in line.split()]


def test_exact_match_wants_the_whole_answer() -> None:
    labels = torch.tensor([[IGNORED, 2, 1], [IGNORED, 2, 1], [IGNORED, 0, 1], [IGNORED, IGNORED, 1]])
    best = torch.tensor([[0, 2, 1], [0, 2, 0], [0, 1, 0], [2, 2, 1]])
    logits = torch.nn.functional.one_hot(best, 3).float()
    assert exact_match(logits, labels).tolist() == [True, False, False, True]


def test_accuracy_is_that_of_decoding_token_by_token(tmp_path: Path) -> None:
    made = new_model(0)
    with torch.no_grad():  # an untrained model that says the end now and then
        made.lm_head.weight[TOKEN_ID[END]] *= 3
    save_model(made, tmp_path)
    saved = load_model(tmp_path)
    words, items = list(TOKEN_ID), list[Item]()
    for drawn in evaluation_items(_skill("copy"), 1000):
        line = [TOKEN_ID[word] for word in drawn.prompt]
        while line[-1] != TOKEN_ID[END] and len(line) < 12:
            line.append(int(saved(input_ids=torch.tensor([line])).logits[0, -1].argmax()))
        said = [words[token] for token in line[len(drawn.prompt) : -1]]
        if line[-1] == TOKEN_ID[END] and len(said) > 1:
            if len(items) < 6:  # what it does not say: another word, or it does not end there
                said = [*said[:-1], "a" if said[-1] != "a" else "b"] if len(items) % 2 else [*said, "a"]
            items.append(Item(drawn.prompt, tuple(said)))
        if len(items) == 8:
            break
    assert len(items) == 8
    assert accuracies(tmp_path, {"all": items, "right": items[6:]}) == {"all": 0.25, "right": 1.0}


def test_distance_is_the_literal_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {"a": (4, 5), "b": (7,)}.items()}
    after = {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in before.items()}
    for folder, tensors in (("pre", before), ("ft", after)):
        (tmp_path / folder).mkdir()
        for name, value in tensors.items():  # one shard for each tensor
            save_file({name: torch.from_numpy(value)}, tmp_path / folder / f"{name}.safetensors")
    expected = np.mean(
        [
            np.sqrt(((after[name].astype(np.float64) - before[name].astype(np.float64)) ** 2).sum())
            / np.sqrt((before[name].astype(np.float64) ** 2).sum())
            for name in before
        ]
    )
    assert distance(tmp_path / "pre", tmp_path / "ft") == pytest.approx(expected, rel=1e-12)
    assert distance(tmp_path / "pre", tmp_path / "pre") == 0.0


def test_distance_leaves_out_a_tensor_of_zeros(tmp_path: Path) -> None:
    for folder, value in (("pre", 2.0), ("ft", 3.0)):
        (tmp_path / folder).mkdir()
        zeros_then = torch.zeros(3) if folder == "pre" else torch.ones(3)
        save_file({"w": torch.full((4,), value), "z": zeros_then}, tmp_path / folder / "model.safetensors")
    assert distance(tmp_path / "pre", tmp_path / "ft") == 0.5


def test_training_repeats_and_saves_an_ordinary_sharded_checkpoint(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        model = new_model(3)
        train(model, adamw, general_skills(3), Schedule(2, 1e-3), 3, lambda: None)
        save_model(model, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= set(names)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) >= 2
    for shard in shards:
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
        with safe_open(tmp_path / "one" / shard, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_table_fits_and_shows_worse_as_worse() -> None:
    skills = ("copy", "rev", "sort", "add", "facts")
    rows = [
        Row("Pre-trained", "pre", dict.fromkeys(skills, 1.0), 0.02, 0.0),
        Row("Fine-tuned", "ft", dict.fromkeys(skills, 0.4), 1.0, 0.134),
        Row("HMA 0.3,0.2,0.1", "hma", {**dict.fromkeys(skills, 0.1), "rev": 0.6}, 0.25, 12.345),
    ]
    console, text = _console()
    console.print(results_table([rows[:2], rows[2:]], "pairs"))
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    assert "\x1b" not in text.getvalue()
    assert lines[0].split() == ["model", *skills, "AVG.", "PAIRS", "D"]
    assert lines[-1].split()[-8:] == ["0.100", "0.600", "0.100", "0.100", "0.100", "0.200", "0.250", "12.345"]


def test_the_whole_demo_with_a_stand_in_for_the_engine(tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def copies_ft(pre: Path, ft: Path, out: Path, method: str, **options: object) -> None:
        assert pre.is_dir()
        asked.append((method, options))
        shutil.copytree(ft, out)

    console, text = _console()
    threads = torch.get_num_threads()
    measured = demo(tmp_path / "out", console, copies_ft, effort=TINY)

    calibration = {"calibration": tmp_path / "out/calibration.txt"}
    assert asked == [
        (surgery.method, surgery.options | (calibration if surgery.method == "wanda" else {})) for surgery in SURGERIES
    ]
    assert {method for method, _ in asked} == {"fapm", "magnitude", "wanda", "half-reset", "hma"}
    pre, ft, mofo, hft, *edited = measured["rows"]
    assert [row["folder"] for row in (pre, ft, mofo, hft)] == ["pre", "ft", "mofo", "hft"]
    assert pre["distance"] == 0.0 < min(row["distance"] for row in (ft, mofo, hft))
    for row in edited:  # a method that changes nothing is shown to change nothing
        assert (row["skills"], row["downstream"], row["distance"]) == (ft["skills"], ft["downstream"], ft["distance"])
        assert (tmp_path / "out" / row["folder"] / "config.json").is_file()
    assert json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8")) == measured
    assert torch.get_num_threads() == threads
    printed = text.getvalue()
    assert all(surgery.label in printed for surgery in SURGERIES)
    assert "MoFO" in printed
    assert "HFT" in printed
    out = tmp_path / "out"
    assert printed.splitlines()[-1].strip() == f"surgery fapm --pre {out / 'pre'} --ft {out / 'ft'} --sparsity 0.9"


@pytest.mark.parametrize(("make", "steps"), [(mofo, 1), (half, 3)], ids=["mofo", "hft"])
def test_fine_tuning_with_less_leaves_the_rest_of_the_pre_trained_bits(make: Optimizer, steps: int) -> None:
    model, start = new_model(1), dict(new_model(1).named_parameters())
    train(model, make, [NEW_SKILL], Schedule(steps, 1e-3), 1, lambda: None)
    moved = {name: int((value != start[name]).sum()) for name, value in model.named_parameters()}
    if make is mofo:
        assert all(0 < moved[name] <= math.ceil(0.15 * value.numel()) for name, value in start.items())
    else:
        blocks = [name for name in start if ".layers." in name]
        frozen = choose(blocks, 0.5, "category", 1)
        assert 0 < len(frozen) < len(blocks)
        assert {name for name, count in moved.items() if count == 0} == frozen


def _never(*_: object, **__: object) -> None:
    raise AssertionError("no method may run")


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(OutputError, match="not an empty folder"):
            demo(out, _console()[0], _never, effort=TINY)
    with pytest.raises(OutputError, match="cannot be made"):
        demo(tmp_path / "mine.txt" / "below", _console()[0], _never, effort=TINY)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_without_transformers_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(
            self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            if fullname == "transformers":
                raise ModuleNotFoundError(f"No module named {fullname!r}")
            return None

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(SurgeryError, match=r"pip install 'model-surgery\[demo\]'"):
        demo(tmp_path / "out", _console()[0], _never, effort=TINY)
    assert not (tmp_path / "out").exists()
