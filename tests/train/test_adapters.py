"""Adapters of peft's other types: trained, merged or kept, and refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import one_thread as one_thread
from helpers.tiny_model import changed, losses, make_model, questions, report, surgery_train, weights
from torch import nn

from surgery.__main__ import main
from surgery.train.holds.adalora import AdaLora
from surgery.train.holds.hold import Scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return questions(model.with_name("data.jsonl"), 16)


@pytest.mark.parametrize("kind", ["adalora", "ia3", "vera"])
def test_a_type_that_can_be_merged_is(model: Path, data: Path, tmp_path: Path, kind: str) -> None:
    assert surgery_train(model, data, tmp_path / "out", "--peft", kind, "--lr", "0.1", "--max-steps", "4") == 0
    counts = changed(model, tmp_path / "out")
    assert {name for name, count in counts.items() if count} <= {name for name in counts if "_proj" in name}
    assert any(counts.values())
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_a_kept_adapter_is_what_the_merged_model_has(model: Path, data: Path, tmp_path: Path) -> None:
    more = ("--peft", "ia3", "--lr", "0.1", "--max-steps", "2")
    assert surgery_train(model, data, tmp_path / "merged", *more) == 0
    assert surgery_train(model, data, tmp_path / "kept", *more, "--keep-adapter") == 0
    words = ["magnitude", "--pre", str(model), "--ft", str(tmp_path / "kept"), "--sparsity", "0"]
    assert main([*words, "--out", str(tmp_path / "edited")]) == 0
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(weights(tmp_path / "edited")[name], tensor)


def test_a_learnt_prompt_stands_beside_the_weights(model: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    more = ("--peft", "prompt_tuning", "--keep-adapter", "--lr", "0.1", "--max-steps", "4")
    assert surgery_train(model, data, tmp_path / "out", *more) == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    totals = report(tmp_path / "out")["totals"]
    assert (totals["differ"], totals["distance_after"]) == (0, 0)
    net: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "out"))
    assert net.get_prompt_embedding_to_save("default").shape == (20, 32)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("qlora",), "--peft qlora: it is LoRA on a model in 4 bits, which needs bitsandbytes and CUDA"),
        (("nothing",), "--peft nothing: peft has no such type. It has"),
        (("p_tuning",), "cannot be merged into the weights: add --keep-adapter"),
        (("hra", "--keep-adapter"), "Leave --keep-adapter out"),
        (("ia3", "--l2", "1"), "give --lora RANK"),
        (("adalora", "--save-every", "1"), "--save-every cannot be had with --peft adalora"),
    ],
)
def test_what_cannot_be_trained_or_written_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], complaint: str
) -> None:
    assert surgery_train(model, data, tmp_path / "out", "--peft", *more) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_adaloras_factors_are_pulled_towards_orthonormal_ones_and_its_ranks_given_out() -> None:
    """γ times the mean of ‖P Pᵀ − I‖ over the factors, by autograd; the budget ends at the rank that was asked for."""
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=1, total_step=1 << 30, target_modules=["0", "1"], deltaT=1, tinit=1)
    net: Any = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), config)
    hold = AdaLora()
    hold.begin(Scene(net, [], [], lambda _: {}, lambda _: (torch.zeros(()), 0), 1, 0, 6))
    factors = {n: p for n, p in net.named_parameters() if "lora_A" in n or "lora_B" in n}
    terms = []
    for name, factor in factors.items():
        gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
        terms.append(((gram - torch.eye(4)) ** 2).sum().sqrt())
    expected = torch.autograd.grad(0.5 * sum(terms) / len(terms), list(factors.values()))
    for _ in range(6):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        hold.gradients(net)
        if hold.step == 0:
            for factor, gradient in zip(factors.values(), expected, strict=True):
                torch.testing.assert_close(factor.grad, gradient)
        for name, parameter in net.named_parameters():
            if "lora" in name and parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        hold.stepped(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert sum(len(layer.lora_E["default"]) for layer in net.modules() if hasattr(layer, "lora_E")) == 8
    kept = [sum(flags) for flags in net.peft_config["default"].rank_pattern.values()]
    assert sum(kept) == 2  # a rank of 1 on each of two matrices
