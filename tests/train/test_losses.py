"""The losses of a token against their formulas in float64, number by number, and in a training against one written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_lm import one_thread as one_thread
from helpers.tiny_model import ids, losses, make_model, questions, report, surgery_train
from transformers import AutoModelForCausalLM

from surgery.train.losses import LOSSES, Strength, dft

F64 = Any


def softmax(row: F64) -> F64:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def literal(name: str, row: F64, label: int, start: F64, strength: Strength) -> float:
    """The loss of one token."""
    p, p0 = softmax(row), softmax(start)
    nll = -math.log(p[label])
    apart = sum(float(a) * math.log(a / b) for a, b in zip(p0, p, strict=True))
    top = softmax(np.sort(row)[::-1][:20])
    entropy = -sum(float(a) * math.log(a) for a in top)
    found: dict[str, float] = {
        "dft": nll * p[label],
        "eaft": nll * (entropy / 3) ** strength.alpha,
        "asft": nll * p[label] + strength.weight * apart,
        "kl": nll + strength.weight * apart,
    }
    return found[name]


@pytest.mark.parametrize("name", ["dft", *LOSSES])
@pytest.mark.parametrize("vocabulary", [7, 50])
def test_each_loss_is_its_formula(name: str, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    logits, start = rng.normal(size=(5, vocabulary)) * 3, rng.normal(size=(5, vocabulary)) * 3
    labels, strength = rng.integers(0, vocabulary, 5), Strength(alpha=1.5, weight=0.3)
    made = LOSSES.get(name, dft)
    found = made(torch.tensor(logits), torch.tensor(labels), torch.tensor(start), strength)
    expected = [
        literal(name, row, label, base, strength) for row, label, base in zip(logits, labels, start, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["dft", "eaft", "asft"])
def test_factors_are_held_fixed(name: str) -> None:
    """The gradient is that of −log p(y) times a number, and of the divergence."""
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    start, labels = torch.randn(3, 30, dtype=torch.float64), torch.tensor([1, 2, 3])
    made = LOSSES.get(name, dft)
    (found,) = torch.autograd.grad(made(logits, labels, start, Strength(weight=0.0)).sum(), logits)
    p = torch.softmax(logits.detach(), -1)
    plain = p - torch.nn.functional.one_hot(labels, 30)
    top = torch.softmax(logits.detach().topk(20).values, -1)
    factor = -(top * top.log()).sum(-1) / 3 if name == "eaft" else p[range(3), labels]
    torch.testing.assert_close(found, plain * factor[:, None])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("losses") / "model")


@pytest.mark.parametrize(
    ("name", "more"),
    [("dft", ()), ("kl", ("--optim", "mofo")), ("asft", ("--lora", "2")), ("eaft", ("--hft", "0.5"))],
)
def test_a_training_minimises_the_loss(model: Path, tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    """In the first step, and, of losses that ask the start model, in one that has moved away from it."""
    data, out = questions(tmp_path / "data.jsonl", 8), tmp_path / "out"
    words = ("--loss", name, "--kl-weight", "2", "--eaft-alpha", "2", "--warmup", "0", "--accumulation", "2")
    assert surgery_train(model, data, out, *words, *more, "--max-steps", "2", "--eval-split", "0") == 0
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    lines = [(f"Question: w{n % 9} w{n % 7} Answer:", f"w{20 + n % 5} w30 </s>") for n in range(8)]
    inputs = torch.tensor([ids(f"{prompt} {answer}") for prompt, answer in lines])
    logits = net(inputs).logits[:, 3:-1].flatten(0, 1).detach().numpy()
    labels = inputs[:, 4:].flatten().tolist()
    strength = Strength(alpha=2.0, weight=2.0)
    each = [literal(name, row, label, row, strength) for row, label in zip(logits, labels, strict=True)]
    first, second = losses(out)
    assert first == pytest.approx(np.mean(each), rel=1e-4)
    assert second != pytest.approx(first, rel=1e-4)


def test_own_text_is_written_once_learnt_beside_the_data_and_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from surgery.train.display import Screen

    data = questions(tmp_path / "data.jsonl", 16)
    own = ("--replay", "self", "--own-passages", "6", "--own-tokens", "8", "--own-weight", "0.5")
    words = (*own, "--warmup", "0", "--accumulation", "2", "--max-steps", "4", "--save-every", "2", "--optim", "mofo")
    assert surgery_train(model, data, tmp_path / "whole", *words) == 0
    assert "writes 6 passages" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "whole" / "surgery-own-text.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(1 <= sum(label >= 0 for label in row["labels"]) <= 8 for row in rows)
    assert len({tuple(row["input_ids"]) for row in rows}) > 1
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = []
    for part in (rows[:4], [*rows[4:], *rows[:2]]):  # two parts of a step, four passages each
        total, count = 0.0, 0
        for row in part:
            logits = net(torch.tensor([row["input_ids"]])).logits[0].detach()
            for at, label in enumerate(row["labels"]):
                if label >= 0:
                    total -= float(torch.log_softmax(logits[at - 1], -1)[label])
                    count += 1
        found.append(total / count)
    steps = report(tmp_path / "whole")["rounds"][0]["steps"]
    assert steps[0]["own_loss"] == pytest.approx(np.mean(found), rel=1e-4)
    assert surgery_train(model, data, tmp_path / "plain", *words[len(own) :]) == 0
    assert steps[0]["loss"] == pytest.approx(losses(tmp_path / "plain")[0] + 0.5 * np.mean(found), rel=1e-4)
    # A run that broke off goes on with the same text to the same end.
    show = Screen.step

    def press(self: Screen, number: int, rounds: int, step: int, steps: int, logs: dict[str, float]) -> None:
        show(self, number, rounds, step, steps, logs)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Screen, "step", press)
        assert surgery_train(model, data, tmp_path / "out", *words) == 130
    assert surgery_train(model, data, tmp_path / "out", *words, "--resume") == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
