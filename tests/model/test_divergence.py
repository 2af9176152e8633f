"""KL over the whole vocabulary, against transformers' own logits and a literal float64 sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_lm import VOCABULARY, ignore, make_lm, open_lm, reference
from helpers.tiny_lm import one_thread as one_thread

from surgery.errors import CheckpointError
from surgery.model.divergence import divergences, remember
from surgery.model.generation import sample
from surgery.model.likelihood import Pair

# gemma2 caps its logits after the head, gpt2 ties it, phi has a bias in it.
FAMILIES = ("llama", "gemma2", "gpt2", "phi", "cohere")


def texts(count: int = 7, vocabulary: int = VOCABULARY) -> list[Pair]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, (count, 2))
    return [
        (random.integers(2, vocabulary, first).tolist(), random.integers(2, vocabulary, second).tolist())
        for first, second in lengths
    ]


def literal(base: Path, other: Path, pairs: list[Pair]) -> list[float]:
    found = []
    for context, tokens in pairs:
        logits = [
            reference(folder)(torch.tensor([(context + tokens)[:-1]])).logits[0, len(context) - 1 :].double()
            for folder in (base, other)
        ]
        p, q = (torch.log_softmax(one, -1) for one in logits)
        known = p.shape[1]
        found.append(float((p.exp() * (p - q[:, :known])).sum(-1).mean()))
    return found


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_is_that_of_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    pre, ft = make_lm(tmp_path / "pre", family), make_lm(tmp_path / "ft", family, seed=2)
    pairs = texts()
    base = remember(open_lm(pre), pairs)
    order = [5, 0, 3, 6]
    found = divergences(open_lm(ft), base, order, ignore)
    expected = literal(pre, ft, pairs)
    assert found == pytest.approx([expected[index] for index in order], rel=1e-4, abs=1e-6)
    assert divergences(open_lm(pre), base, range(len(pairs)), ignore) == pytest.approx(0, abs=1e-6)


@torch.inference_mode()
def test_tokens_that_only_the_model_has_take_their_share(tmp_path: Path) -> None:
    pre, ft = make_lm(tmp_path / "pre"), make_lm(tmp_path / "ft", seed=2, vocab_size=VOCABULARY + 8)
    pairs = texts()
    found = divergences(open_lm(ft), remember(open_lm(pre), pairs), range(len(pairs)), ignore)
    assert found == pytest.approx(literal(pre, ft, pairs), rel=1e-4)


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    pre, ft = make_lm(tmp_path / "pre", vocab_size=VOCABULARY + 8), make_lm(tmp_path / "ft")
    with pytest.raises(CheckpointError, match="do not compare"):
        divergences(open_lm(ft), remember(open_lm(pre), texts()), [0], ignore)


def test_sampling_follows_the_models_probabilities(tmp_path: Path) -> None:
    """The first token of many texts, against the probabilities that transformers gives it."""
    folder = make_lm(tmp_path / "pre")
    model = open_lm(folder)
    prompt, count = [5, 9, 7], 600
    written = sample(model, [prompt] * count, 1, 0, ignore)
    with torch.inference_mode():
        p = torch.softmax(reference(folder)(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    seen = np.bincount([tokens[0] for tokens in written], minlength=len(p)) / count
    top = np.argsort(-p)[:3]
    assert seen[top] == pytest.approx(p[top], abs=4 * float(np.sqrt(p[top] * (1 - p[top]) / count).max()))
    assert written == sample(model, [prompt] * count, 1, 0, ignore)
    assert written != sample(model, [prompt] * count, 1, 1, ignore)


def test_a_text_ends_with_its_end_and_holds_a_token_at_least(tmp_path: Path) -> None:
    model = open_lm(make_lm(tmp_path / "pre"))
    end = model.tokenizer.eos_token_id
    for tokens in sample(model, [[0]] * 40, 30, 0, ignore):
        assert 1 <= len(tokens) <= 30
        assert end not in tokens[:-1]
