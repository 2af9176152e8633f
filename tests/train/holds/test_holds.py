"""Ways to stay near the start against their formulas, on small networks in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_lm import one_thread as one_thread
from helpers.tiny_model import changed, make_model, questions, report, surgery_train, weights
from torch import nn

from surgery.layout import place
from surgery.train.holds.ewc import Ewc
from surgery.train.holds.gem import Gem, turn
from surgery.train.holds.hold import Scene
from surgery.train.holds.proximal import Proximal
from surgery.train.holds.soft_mask import SoftMask, importance

ROWS = [{"input_ids": [n % 5, (n + 2) % 5, (3 * n) % 5], "labels": [-100, (n + 2) % 5, (3 * n) % 5]} for n in range(6)]


class Net(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 3, dtype=torch.float64), nn.Linear(3, 5, dtype=torch.float64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]


def nll(net: nn.Module, rows: Sequence[Any]) -> tuple[torch.Tensor, int]:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logs = torch.log_softmax(net(torch.tensor(row["input_ids"])), -1)
        for at, label in enumerate(row["labels"]):
            if label >= 0:
                total, count = total - logs[at - 1, label], count + 1
    return total, count


def scene(net: nn.Module, memory: list[list[Any]], number: int = 2) -> Scene:
    return Scene(net, ROWS, memory, lambda rows: {}, lambda rows: nll(net, rows), number, 0)


def test_ewc_pulls_each_weight_by_its_fisher_information() -> None:
    net = Net()
    hold = Ewc(0.7, 64)
    hold.begin(scene(net, [ROWS[:2], ROWS[2:5]]))
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    fisher = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in ROWS[:5]:
        net.zero_grad()
        torch.autograd.backward(nll(net, [row])[0])
        for name, p in net.named_parameters():
            assert p.grad is not None
            fisher[name] += p.grad**2 / 5
    net.zero_grad()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
            p.grad = torch.ones_like(p)
    hold.gradients(net)
    for name, p in net.named_parameters():
        here = p.detach().clone().requires_grad_()
        torch.autograd.backward(0.7 * (fisher[name] * (here - start[name]) ** 2).sum())
        assert here.grad is not None
        torch.testing.assert_close(p.grad, 1 + here.grad, rtol=1e-5, atol=1e-8)  # F is kept in float32
    assert hold.report() == {"ewc": {"rows": 5}}
    hold.begin(scene(net, []))
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    hold.gradients(net)
    assert all(torch.equal(p.grad, old) for p, old in zip(net.parameters(), before, strict=True) if p.grad is not None)


def best(gradient: Any, memory: Any) -> Any:
    """The nearest vector with no negative product, by trying which constraints bind."""
    found = []
    for count in range(len(memory) + 1):
        for binding in itertools.combinations(range(len(memory)), count):
            rows = memory[list(binding)]
            turned = gradient - rows.T @ np.linalg.lstsq(rows.T, gradient, rcond=None)[0] if count else gradient
            if (memory @ turned >= -1e-9).all():
                found.append(turned)
    return min(found, key=lambda turned: float(np.sum((turned - gradient) ** 2)))


@pytest.mark.parametrize("seed", range(20))
def test_gem_finds_the_nearest_gradient_that_harms_no_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradient, memory = rng.normal(size=9), rng.normal(size=(1 + seed % 4, 9))
    if seed % 5 == 4:
        memory[-1] = memory[0]  # two parts that say the same
    factors = turn(memory @ gradient, memory @ memory.T)
    assert (factors >= 0).all()
    np.testing.assert_allclose(gradient + memory.T @ factors, best(gradient, memory), atol=1e-7)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_steps_gradient_is_turned_by_those_of_the_memory(averaged: bool) -> None:
    net = Net()
    parts = [ROWS[:2], ROWS[2:5]]
    hold = Gem(averaged, 64)
    hold.begin(scene(net, parts))
    memory = []
    for part in [[*parts[0], *parts[1]]] if averaged else parts:
        net.zero_grad()
        loss, count = nll(net, part)
        torch.autograd.backward(loss / count)
        memory.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).numpy().copy())
    against = -sum(memory)  # raises the loss on the parts
    for p, grad in zip(net.parameters(), _cut(net, against), strict=True):
        p.grad = grad
    hold.gradients(net)
    found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).numpy()
    np.testing.assert_allclose(found, best(against, np.array(memory)), atol=1e-8)
    assert hold.report()["gem"] == {"rows": 5, "steps_turned": 1}


def _cut(net: nn.Module, vector: Any) -> list[torch.Tensor]:
    parts = torch.split(torch.tensor(vector), [p.numel() for p in net.parameters()])
    return [part.view(p.shape).clone() for part, p in zip(parts, net.parameters(), strict=True)]


def test_the_proximal_step_goes_to_where_pull_and_distance_balance() -> None:
    net = Net()
    hold = Proximal(0.4)
    hold.begin(scene(net, [], number=1))
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.head.bias.grad = None  # frozen
    optimizer.step()
    behind = [p.detach().clone() for p in net.parameters()]
    hold.stepped(net, optimizer)
    for p, x, x0 in zip(net.parameters(), behind, start, strict=True):
        if p.grad is None:
            assert torch.equal(p, x0)
            continue
        here = p.detach().clone().requires_grad_()  # where ½‖x − θ‖² + ηλ‖x − θ0‖² has no slope
        torch.autograd.backward(0.5 * ((here - x) ** 2).sum() + 0.5 * 0.4 * ((here - x0) ** 2).sum())
        assert here.grad is not None
        assert float(here.grad.abs().max()) < 1e-12


def test_importance_is_tanh_of_what_is_normalised() -> None:
    found = importance(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    numbers = np.array([1.0, 2.0, 3.0, 6.0])
    np.testing.assert_allclose(found.numpy(), np.abs(np.tanh((numbers - 3) / numbers.std())))
    assert not importance(torch.ones(4)).any()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("holds") / "model")


def test_a_unit_that_nothing_depends_on_keeps_its_gradient_and_others_lose_some(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight[:, 3] = 0.0  # what unit 3 of up_proj says is not heard
    rows = [{"input_ids": [n + 5, 7, 9, n], "labels": [-100, 7, 9, n]} for n in range(6)]
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    hold = SoftMask(64)
    hold.begin(Scene(net, rows, [], lambda _: batch, lambda _: (torch.zeros(()), 0), 1, 0))
    kept = hold.kept["model.layers.0.mlp.up_proj.weight"].flatten()
    assert kept.shape == (48,)
    assert bool(((kept >= 0) & (kept <= 1)).all())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    hold.gradients(net)
    gradient = net.model.layers[0].mlp.up_proj.weight.grad
    assert torch.equal(gradient, kept[:, None].expand(48, 32))
    assert float(gradient.std()) > 0.05
    assert torch.equal(net.model.norm.weight.grad, torch.ones(32))
    # The sensitivity of that unit is zero: the lowest of its matrix.
    sensitive = 1 - kept
    assert float(sensitive[3]) > 0  # far from the mean, by the formula's absolute value


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ewc", "5", "--optim", "mofo"), "ewc"),
        (("--gem", "gem", "--optim", "mofo"), "gem"),
        (("--gem", "a-gem", "--hft", "0.5"), "gem"),
        (("--ewc", "5", "--lora", "2", "--replay", "self", "--own-passages", "4", "--own-tokens", "8"), "ewc"),
        (("--soft-mask", "--optim", "mofo"), "soft_mask"),
        (("--proximal", "0.1", "--hft", "0.5"), ""),
    ],
)
def test_they_go_with_the_papers_optimizers_over_several_rounds(
    model: Path, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    tasks = [questions(tmp_path / f"{n}.jsonl", 16, shift=20 * n) for n in range(2)]
    words = ("--max-steps", "2", "--memory-rows", "4", "--warmup", "0")
    assert surgery_train(model, tasks, tmp_path / "out", *words, *more) == 0
    first, second = (round["holds"] for round in report(tmp_path / "out")["rounds"])
    if said in ("ewc", "gem"):
        parts = [("self" in more) * 4, 4 + ("self" in more) * 4]
        assert [first[said]["rows"], second[said]["rows"]] == parts
    elif said:
        assert first[said] == second[said] == {"rows": 4}


def test_cofitune_trains_the_feed_forward_of_its_layers_alone(model: Path, tmp_path: Path) -> None:
    data = questions(tmp_path / "data.jsonl", 16)
    assert surgery_train(model, data, tmp_path / "out", "--cofitune", "1:3", "--max-steps", "2", "--warmup", "0") == 0
    moved = {name for name, count in changed(model, tmp_path / "out").items() if count}
    places = {name: place(name) for name in weights(model)}
    assert moved == {name for name, at in places.items() if at.category == "feed_forward" and at.layer in (1, 2)}
    assert report(tmp_path / "out")["rounds"][0]["holds"] == {"soft_mask": {"rows": 16}}
