"""Generated answers, against transformers' own generation of one prompt after another."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import LENGTH, VOCABULARY, ignore, make_lm, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread

from surgery.errors import CheckpointError, OptionError
from surgery.model.generation import generate


def prompts(count: int = 7) -> list[list[int]]:
    draw = random.Random(9)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, 25))] for _ in range(count)]


def alone(folder: Path, most: int, ends: list[int]) -> list[list[int]]:
    """The new tokens of each prompt by itself, up to an end of the text."""
    model: Any = reference(folder)
    found = []
    for prompt in prompts():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
        )[0, len(prompt) :].tolist()
        found.append(output[: next((at for at, token in enumerate(output) if token in ends), len(output))])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "mamba"])
def test_answers_are_those_of_each_prompt_alone_at_any_batch_size(tmp_path: Path, family: str) -> None:
    more: dict[str, Any] = {"sliding_window": 8} if family == "gemma2" else {}
    folder = make_lm(tmp_path / "a", family, **more)
    expected = alone(folder, 12, [1])
    for batch in (1, 3):
        model = open_lm(folder, batch=batch)
        answers, cut = generate(model, prompts(), 12, None, ignore)
        assert answers == [model.tokenizer.decode(found, skip_special_tokens=True) for found in expected]
        assert cut == 0
    assert len(set(answers)) > 4  # else nothing was compared


def test_an_answer_ends_where_the_model_or_the_tokenizer_says(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a")
    free = alone(folder, 12, [1])
    end = free[0][4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1], "repetition_penalty": 5.0}))
    expected = alone_ending(free, [end, 1])
    model = open_lm(folder)
    answers, _ = generate(model, prompts(), 12, None, ignore)
    assert answers == [model.tokenizer.decode(found, skip_special_tokens=True) for found in expected]
    assert len(expected[0]) <= 4


def alone_ending(found: list[list[int]], ends: list[int]) -> list[list[int]]:
    return [tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))] for tokens in found]


def test_a_penalty_that_the_model_brings_along_is_not_applied(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a")
    expected, _ = generate(open_lm(folder), prompts(), 12, None, ignore)
    model = open_lm(folder)
    model.model.generation_config.repetition_penalty = 5.0
    assert generate(model, prompts(), 12, None, ignore)[0] == expected
    assert model.model.generation_config.repetition_penalty == 5.0


def test_an_answer_ends_before_the_stop_and_generation_with_it(tmp_path: Path) -> None:
    model = open_lm(make_lm(tmp_path / "a"))
    whole, _ = generate(model, prompts(), 12, None, ignore)
    stop = whole[2][5:8]
    steps: list[int] = []
    model.model.register_forward_hook(lambda module, inputs, output: steps.append(1))
    answers, _ = generate(model, [prompts()[2]], 12, stop, ignore)
    assert answers == [whole[2].partition(stop)[0]]
    assert len(steps) < 12
    assert generate(model, prompts(), 12, stop, ignore)[0] == [text.partition(stop)[0] for text in whole]


def test_a_long_prompt_is_cut_from_the_left_and_counted(tmp_path: Path) -> None:
    model = open_lm(make_lm(tmp_path / "a", "gpt2"))
    long = [2 + index % 300 for index in range(200)]
    answers, cut = generate(model, [long, [5]], 10, None, ignore)
    assert cut == 1
    assert answers[0] == generate(model, [long[-(LENGTH - 10) :]], 10, None, ignore)[0][0]


def test_what_cannot_be_generated_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a", "gpt2")
    with pytest.raises(OptionError, match=f"`max_new_tokens` {LENGTH}"):
        generate(open_lm(folder), [[5]], LENGTH, None, ignore)
    (folder / "generation_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generate(open_lm(folder), [[5]], 3, None, ignore)
