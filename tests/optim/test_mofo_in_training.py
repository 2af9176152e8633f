"""MoFO where people use it: groups, closures, schedulers, clipping, scalers, state dicts, accelerate, transformers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.optim import MoFO


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        torch.autograd.backward(model(batch(step, dtype)).pow(2).mean())
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, weights(one), weights(other)))


def test_the_toy_of_the_paper_ends_on_an_axis_where_adam_ends_in_the_corner() -> None:
    """§5: L_ft = (θ₁−1)²(θ₂−1)² from (0, 0), α = 50%."""
    ends = []
    for make in (lambda p: torch.optim.Adam(p, lr=0.01), lambda p: MoFO(p, lr=0.01, alpha=0.5)):
        theta = nn.Parameter(torch.zeros(2))
        optimizer = make([theta])
        for _ in range(1200):
            optimizer.zero_grad()
            torch.autograd.backward((theta[0] - 1) ** 2 * (theta[1] - 1) ** 2)
            optimizer.step()
        ends.append(theta.detach())
    torch.testing.assert_close(ends[0], torch.ones(2), atol=0.1, rtol=0)
    assert ends[1].tolist() == [pytest.approx(1, abs=0.05), 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"filter": "random"}, {"rounding": "master"}, {"rounding": "stochastic"}], ids=str
)
def test_a_run_that_is_resumed_from_a_file_goes_on_as_if_nothing_had_been(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if dtype == torch.float16 and options == {"rounding": "stochastic"}:
        return
    model = network(dtype)
    optimizer = MoFO(model.parameters(), lr=0.01, alpha=0.3, **options)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))

    resumed = network(dtype)
    other = MoFO(resumed.parameters())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert all(state["exp_avg"].dtype == torch.float32 for state in other.state.values())
    train(resumed, other, range(3, 6))
    assert equal(model, resumed)
    again = copy.deepcopy(other)
    assert again.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_groups_have_their_own_settings_and_parameters_without_a_gradient_are_left_alone() -> None:
    model = network()
    unused = nn.Parameter(torch.ones(3))
    optimizer = MoFO(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters(), "alpha": 1.0}], lr=0.1
    )
    optimizer.add_param_group({"params": [unused]})
    before = weights(model)
    train(model, optimizer, range(1))
    moved = [int((now != old).sum()) for now, old in zip(weights(model), before, strict=True)]
    assert moved == [0, 0, 0, 0, 64, 4]
    assert unused.tolist() == [1, 1, 1]
    assert unused not in optimizer.state


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    theta = nn.Parameter(torch.ones(2))
    optimizer = MoFO([theta], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (theta**2).sum()
        torch.autograd.backward(loss)
        return loss

    assert optimizer.step(closure) == 2  # type: ignore[arg-type]
    assert theta.tolist() == pytest.approx([0.5, 1.0])


def test_schedulers_clipping_and_a_learning_rate_in_a_tensor() -> None:
    one, other = network(), network()
    optimizers = [MoFO(one.parameters(), lr=0.1), MoFO(other.parameters(), lr=torch.tensor(0.1))]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4) for optimizer in optimizers]
    for step in range(4):
        for model, optimizer, scheduler in zip((one, other), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(model(batch(step)).pow(2).mean())
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
    for left, right in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    before = weights(one)
    train(one, optimizers[0], range(4, 5))  # the schedule has come to 0
    assert all(map(torch.equal, weights(one), before))


def test_a_gradient_scaler_skips_the_step_that_overflowed() -> None:
    model, plain = network(), network()
    optimizer, other = MoFO(model.parameters(), lr=0.01), MoFO(plain.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, overflow in enumerate([False, True, False]):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(model(batch(step)).pow(2).mean() * (torch.inf if overflow else 1)))
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(map(torch.equal, weights(model), before))
        else:
            train(plain, other, range(step, step + 1))
    assert equal(model, plain)


def test_a_compiled_model_trains_the_same_parameters() -> None:
    model, plain = network(), network()
    compiled = torch.compile(model, backend="eager")
    train(compiled, MoFO(compiled.parameters(), lr=0.01), range(3))  # type: ignore[arg-type,attr-defined]
    train(plain, MoFO(plain.parameters(), lr=0.01), range(3))
    assert equal(model, plain)


def test_accelerate_prepares_it_and_saves_its_state(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = network()
    train(plain, MoFO(plain.parameters(), lr=0.01), range(4))
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, MoFO(model.parameters(), lr=0.01))
    for step in range(4):
        if step == 2:
            accelerator.save_state(str(tmp_path))
            train(model, optimizer, range(50, 52))
            accelerator.load_state(str(tmp_path))
        optimizer.zero_grad()
        accelerator.backward(model(batch(step)).pow(2).mean())
        optimizer.step()
    assert equal(model, plain)


def test_the_trainer_of_transformers_trains_with_it_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    rows = [{"input_ids": [i % 32, 3, 5, 7], "labels": [i % 32, 3, 5, 7]} for i in range(16)]

    def run(folder: Path, resume: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            max_grad_norm=1.0, disable_tqdm=True, seed=1, save_strategy="steps", lr_scheduler_type="cosine",
        )  # fmt: skip
        optimizer = MoFO(model.parameters(), lr=1e-2, filter="random")
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return weights(model)

    straight = run(tmp_path, False)
    assert all(map(torch.equal, run(tmp_path, True), straight))
