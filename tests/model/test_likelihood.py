"""Log-likelihoods of many texts at once, against transformers' loss of each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import LENGTH, VOCABULARY, hf_loss, ignore, make_lm, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, OptionError
from surgery.model.likelihood import Pair, fit, loglikelihoods

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0},
    "cohere": {},
    "bloom": {},
    "mamba": {},
    "mixtral": {},
}


def pairs(count: int = 11) -> list[Pair]:
    """Contexts and continuations of all lengths, one of them the shortest there is."""
    draw = random.Random(5)
    found = [([7], [8])]
    for _ in range(count - 1):
        one, other = (
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 30))],
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))],
        )
        found.append((one, other))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_as_likely_as_alone(tmp_path: Path, family: str) -> None:
    folder = make_lm(tmp_path / "a", family, **FAMILIES[family])
    model, plain = open_lm(folder), reference(folder)
    found = loglikelihoods(model, pairs(), ignore)
    for (context, continuation), total in zip(pairs(), found, strict=True):
        assert total == pytest.approx(-hf_loss(plain, context, continuation) * len(continuation), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "gpt_neox", "opt", "phi3"])
def test_a_context_with_several_continuations_is_read_once(tmp_path: Path, family: str) -> None:
    folder = make_lm(tmp_path / "a", family, **FAMILIES.get(family, {}))
    model, plain = open_lm(folder, batch=6), reference(folder)
    draw = random.Random(6)
    contexts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (9, 30, 2, 17, 1)]
    asked = [
        (context, [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 7))])
        for context in contexts
        for _ in range(draw.randint(2, 4))
    ]
    draw.shuffle(asked)
    asked += [(contexts[0], []), ([5, 6, 7], [8])]
    read: list[int] = []
    model.model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: read.append(inputs[0].numel()))
    found = loglikelihoods(model, asked, ignore)
    for (context, continuation), total in zip(asked, found, strict=True):
        alone = -hf_loss(plain, context, continuation) * len(continuation) if continuation else 0.0
        assert total == pytest.approx(alone, rel=2e-5, abs=2e-5)
    if family in ("llama", "gpt2", "qwen2", "gpt_neox"):
        assert sum(read) < 0.7 * sum(len(context) + len(continuation) for context, continuation in asked)


def test_an_empty_continuation_is_certain(tmp_path: Path) -> None:
    assert loglikelihoods(open_lm(make_lm(tmp_path / "a")), [([5, 6, 7], [])], ignore) == [0.0]


def test_neither_batches_nor_the_room_for_logits_change_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_lm(tmp_path / "a")
    alone = loglikelihoods(open_lm(folder, batch=1), pairs(), ignore)
    for batch in (2, 5, 100):
        found = loglikelihoods(open_lm(folder, batch=batch), pairs(), ignore)
        assert found == pytest.approx(alone, rel=1e-5)
    monkeypatch.setattr("surgery.model.likelihood.LOGITS", 14 * VOCABULARY)
    monkeypatch.setattr("surgery.model.likelihood.PIECE", 3 * VOCABULARY)
    found = loglikelihoods(open_lm(folder, batch=100), pairs(), ignore)
    assert found == pytest.approx(alone, rel=1e-5)


def test_logits_are_made_for_scored_tokens_alone_and_within_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_lm(make_lm(tmp_path / "a"), batch=100)
    made: list[int] = []
    model.model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output[..., 0].numel()))
    loglikelihoods(model, pairs(), ignore)
    scored = sum(len(continuation) for _, continuation in pairs())
    assert made == [scored]
    made.clear()
    monkeypatch.setattr("surgery.model.likelihood.LOGITS", 14 * VOCABULARY)
    loglikelihoods(model, pairs(), ignore)
    assert sum(made) == scored
    assert len(made) > 3
    assert max(made) <= 14


def test_progress_counts_texts_to_the_last(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    loglikelihoods(open_lm(make_lm(tmp_path / "a")), pairs(), lambda done, total: seen.append((done, total)))
    assert seen == [(3, 11), (6, 11), (9, 11), (11, 11)]


def test_a_long_context_is_cut_from_the_left_and_counted(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a", "gpt2")
    model, plain = open_lm(folder), reference(folder)
    context, answer = [index % 300 for index in range(150)], [4, 5, 6]
    fitted, cut = fit(model, [(context, answer), ([1], answer)])
    assert cut == 1
    assert fitted[0] == (context[-(LENGTH - 2) :], answer)  # the last token is not read
    found, _ = loglikelihoods(model, [(context, answer), ([1], answer)], ignore)
    with torch.inference_mode():
        ids = (fitted[0][0] + answer)[:-1]
        assert len(ids) == LENGTH
        logs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    exact = sum(float(logs[len(ids) - 3 + at, token]) for at, token in enumerate(answer))
    assert found == pytest.approx(exact, rel=1e-5)


def test_what_cannot_be_scored_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = open_lm(make_lm(tmp_path / "a", "gpt2"))
    with pytest.raises(OptionError, match=f"97 tokens, and the model takes {LENGTH}"):
        loglikelihoods(model, [([1], [2] * 97)], ignore)
    with pytest.raises(CheckpointError, match=f"token {VOCABULARY}, and the model has {VOCABULARY}"):
        loglikelihoods(model, [([1], [2, VOCABULARY])], ignore)


def test_a_model_that_computes_no_numbers_gets_no_score(tmp_path: Path) -> None:
    folder = make_lm(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        loglikelihoods(open_lm(folder), pairs(), ignore)
