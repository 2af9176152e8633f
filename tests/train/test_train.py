"""`surgery train` end to end, against loops that are written out here."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.tiny_model import (
    END,
    changed,
    ids,
    left,
    losses,
    make_model,
    questions,
    report,
    surgery_train,
    weights,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.__main__ import main
from surgery.methods.half_reset import choose
from surgery.optim.lion import Lion
from surgery.train.holds.hold import Scene
from surgery.train.holds.mixout import Mixout

OPTIMIZERS = ("adamw", "mofo", "hft", "lion", "sgd")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For models this small a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def model(base: Path) -> Path:
    return make_model(base / "model")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return questions(base / "data.jsonl")


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The first questions of `questions` as the trainer batches them: (input_ids, labels), [count, 7]; all of one length."""
    lines = [(f"Question: w{n % 9} w{n % 7} Answer:", f"w{20 + n % 5} w30 </s>") for n in range(count)]
    inputs = torch.tensor([ids(f"{prompt} {answer}") for prompt, answer in lines])
    labels = inputs.clone()
    labels[:, :4] = -100
    return inputs, labels


def literal(
    model: Path,
    make: Callable[[Any], torch.optim.Optimizer],
    steps: int,
    pull: Callable[[Any, Any], None] | None = None,
) -> tuple[Any, list[float]]:
    """Full-batch training on `batch` at a constant rate, written out."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = make(net.parameters())
    inputs, labels = batch()
    found = []
    for _ in range(steps):
        logits = net(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if pull is not None:
            for name, parameter in net.named_parameters():
                pull(parameter, start[name])
        optimizer.step()
        found.append(loss.item())
    return net, found


FULL = ("--batch-size", "8", "--schedule", "constant", "--warmup", "0", "--clip", "0")


@pytest.fixture(scope="module")
def eight(base: Path) -> Path:
    """As many questions as a batch holds, so that each step sees all of them."""
    return questions(base / "eight.jsonl", 8)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_losses_go_down_and_the_result_is_an_ordinary_checkpoint(
    model: Path, data: Path, tmp_path: Path, optim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"sgd": "0.5", "lion": "3e-3"}.get(optim, "1e-2")
    out = tmp_path / "out"
    assert surgery_train(model, data, out, "--optim", optim, "--lr", rate, "--max-steps", "8") == 0
    found = losses(out)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.3
    assert left(tmp_path) == ["out"]
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, re.sub(r"/\S*/", "", shown.out).splitlines())) <= 80
    assert f"Wrote {out}" in shown.out
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    if optim == "mofo":
        assert main(["fapm", "--pre", str(model), "--ft", str(out), "--out", str(tmp_path / "edited")]) == 0
        names = {path.name for path in (tmp_path / "edited").iterdir()}
        assert not {name for name in names if name.startswith("surgery-train")}
        assert report(tmp_path / "edited")["method"] == "fapm"
        assert main(["diff", "--pre", str(model), "--ft", str(out)]) == 0
        assert "damaged" not in capsys.readouterr().out


def test_a_run_is_the_loop_that_one_would_write(model: Path, eight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert surgery_train(model, eight, out, *FULL, "--max-steps", "4", "--lr", "3e-3") == 0
    net, found = literal(model, lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0), 4)
    assert losses(out) == pytest.approx(found, rel=1e-5)
    after = weights(out)
    for name, parameter in net.state_dict().items():
        torch.testing.assert_close(after[name], parameter, rtol=1e-3, atol=3e-4)
    # In parts, and with activations computed twice, it is the same.
    more = ("--accumulation", "4", "--gradient-checkpointing")
    assert surgery_train(model, eight, tmp_path / "parts", *FULL, "--max-steps", "4", "--lr", "3e-3", *more) == 0
    assert losses(tmp_path / "parts") == pytest.approx(found, rel=1e-5)


def test_the_distance_and_the_share_that_changed_are_those_of_the_files(
    model: Path, data: Path, tmp_path: Path
) -> None:
    assert surgery_train(model, data, tmp_path / "out", "--optim", "mofo") == 0
    before, after = weights(model), weights(tmp_path / "out")
    ratios = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    found = report(tmp_path / "out")
    assert found["totals"]["distance_after"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    counts = changed(model, tmp_path / "out")
    assert found["totals"]["differ"] == sum(counts.values())


def test_mofo_changes_alpha_of_each_tensor_where_the_gradient_is_largest(
    model: Path, eight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert surgery_train(model, eight, out, *FULL, "--optim", "mofo", "--alpha", "0.15", "--max-steps", "1") == 0
    gradients: dict[int, torch.Tensor] = {}
    net, _ = literal(
        model, lambda params: torch.optim.SGD(params, lr=0.0), 1, lambda p, _: gradients.update({id(p): p.grad})
    )
    before, after, counts = weights(model), weights(out), changed(model, out)
    for name, parameter in net.named_parameters():
        most = math.ceil(0.15 * parameter.numel())
        size = gradients[id(parameter)].abs()
        if int((size > 0).sum()) >= most:
            assert counts[name] == most, name
        moved = before[name] != after[name]
        # Adam's first step: the rate, in the gradient's direction. Near the threshold, rounding may decide.
        assert size[moved].min() >= size[~moved].max() * (1 - 1e-4)
        step = (after[name] - before[name])[moved & (size > 1e-5)]
        torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-2), rtol=1e-2, atol=1e-5)


def test_mofo_filters_q_k_and_v_of_one_tensor_apart(data: Path, tmp_path: Path) -> None:
    """GPT-NeoX (Pythia) has them head by head: [heads, 3, rows of a head, width]."""
    model = make_model(tmp_path / "neox", family="gpt_neox")
    more = ("--optim", "mofo", "--alpha", "0.1", "--max-steps", "1", "--warmup", "0", "--schedule", "constant")
    assert surgery_train(model, data, tmp_path / "out", *more) == 0
    before, after = weights(model), weights(tmp_path / "out")
    for name in (name for name in before if "query_key_value.weight" in name):
        moved = (before[name] != after[name]).view(4, 3, 8, 32)
        assert [int(moved[:, part].sum()) for part in range(3)] == [math.ceil(0.1 * 32 * 32)] * 3, name


def test_the_schedule_of_the_papers_theorem_and_the_form_of_gradient_descent(
    model: Path, eight: Path, tmp_path: Path
) -> None:
    more = ("--optim", "mofo", "--form", "gd", "--alpha", "1", "--schedule", "sqrt", "--lr", "0.1", "--max-steps", "4")
    assert surgery_train(model, eight, tmp_path / "out", *FULL[:2], *FULL[4:], *more) == 0
    rates = [step["learning_rate"] for step in report(tmp_path / "out")["rounds"][0]["steps"]]
    assert rates == pytest.approx([0.1 / math.sqrt(t) for t in (1, 2, 3, 4)])
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    inputs, labels = batch()
    for rate in rates:
        logits = net(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= rate * parameter.grad
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(weights(tmp_path / "out")[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_hft_leaves_what_half_reset_would_reset_bit_for_bit(base: Path, data: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    assert surgery_train(model, data, tmp_path / "out", "--optim", "lion", "--hft", "0.5", "--seed", "3") == 0
    counts = changed(model, tmp_path / "out")
    frozen = choose(list(counts), 0.5, "category", 3)
    assert frozen == {name for name, count in counts.items() if not count}
    assert 0 < len(frozen) < len(counts)
    assert set(report(tmp_path / "out")["rounds"][0]["frozen"]["tensors"]) == frozen
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_counts_and_groups_that_are_frozen_are_planned_and_keep_their_bits(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--frozen-attention", "3", "--frozen-feed-forward", "1,2", "--freeze", "embedding,head", "--warmup", "0")
    assert surgery_train(model, data, tmp_path / "out", *more, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["rounds"][0]
    assert not left(tmp_path)
    assert surgery_train(model, data, tmp_path / "out", *more, "--dry-run") == 0
    assert "Trained of the layers" in capsys.readouterr().out
    assert surgery_train(model, data, tmp_path / "out", *more) == 0
    found = report(tmp_path / "out")["rounds"][0]["frozen"]
    assert found == planned["frozen"]
    counts = changed(model, tmp_path / "out")
    assert set(found["tensors"]) == {name for name, count in counts.items() if not count}
    for layer in range(3):
        names = [name for name in found["tensors"] if f"layers.{layer}." in name]
        assert sum("self_attn" in name for name in names) == 3
        assert sum("mlp" in name for name in names) == (1, 2)[layer % 2]
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(found["tensors"])
    sizes = {name: tensor.numel() for name, tensor in weights(model).items() if "layers" in name}
    trained = sum(size for name, size in sizes.items() if name not in found["tensors"])
    assert found["trainable"] == pytest.approx(trained / sum(sizes.values()))


def test_the_dtype_of_the_result_can_be_chosen(model: Path, data: Path, tmp_path: Path) -> None:
    more = ("--dtype", "bfloat16", "--save-dtype", "bfloat16")
    assert surgery_train(model, data, tmp_path / "out", *more) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_packed_rows_do_not_see_each_other(model: Path, eight: Path, tmp_path: Path) -> None:
    """The loss of a step is the same, whether rows stand by themselves or behind others."""
    assert surgery_train(model, eight, tmp_path / "rows", "--max-steps", "1") == 0
    more = ("--packing", "--seq-len", "28", "--batch-size", "2", "--max-steps", "1")  # four rows of 7 tokens, twice
    assert surgery_train(model, eight, tmp_path / "packed", *more) == 0
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_lion_is_its_papers_algorithm() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    theta, momentum = parameter.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    for _ in range(6):
        gradient = torch.randn(5, 3, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        theta = theta - 0.01 * (torch.sign(0.9 * momentum + 0.1 * gradient) + 0.1 * theta)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.detach(), theta)


def test_two_processes_make_the_same_steps_as_one(model: Path, data: Path, tmp_path: Path) -> None:
    numbers = "--optim mofo --lr 1e-2 --batch-size 8 --max-steps 4 --schedule constant --warmup 0 --hft 0.5".split()
    words = ["train", "--model", str(model), "--data", str(data), *numbers]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "surgery"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *words, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.count("Wrote") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    far = sum(int(((one[name] - two[name]).abs() > 1e-4).sum()) for name in one)
    assert far < 0.01 * sum(map(torch.numel, one.values()))  # near a threshold, rounding decides who is updated
    assert sorted(left(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize("option", ["--l1", "--l2"])
def test_a_penalty_pulls_towards_the_start(model: Path, eight: Path, tmp_path: Path, option: str) -> None:
    """Three steps of SGD with the penalty in the loss, by autograd."""

    def pull(parameter: Any, start: torch.Tensor) -> None:
        here = parameter.detach().clone().requires_grad_()
        away = here - start
        penalty = 0.3 * (away.abs().sum() if option == "--l1" else (away**2).sum())
        parameter.grad += torch.autograd.grad(penalty, here)[0]

    out = tmp_path / "out"
    more = ("--optim", "sgd", "--lr", "0.1", option, "0.3", "--accumulation", "2")
    assert surgery_train(model, eight, out, *FULL, *more) == 0
    net, found = literal(model, lambda params: torch.optim.SGD(params, lr=0.1), 3, pull)
    _, other = literal(model, lambda params: torch.optim.SGD(params, lr=0.1), 3)
    assert losses(out) == pytest.approx(found, rel=1e-4)
    assert abs(found[-1] - other[-1]) > 1e-3  # it makes a difference
    if option == "--l2":  # an L1 gradient jumps at θ0, where rounding decides
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(weights(out)[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_mixout_mixes_and_passes_gradients_as_its_formula_says() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 30)
    hold = Mixout(0.4)
    hold.begin(Scene(layer, [], [], lambda _: {}, lambda _: (torch.zeros(()), 0), 1, 0))
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)  # now every entry differs from its start
    own, bias, inputs = layer.weight.detach().clone(), layer.bias.detach().clone(), torch.randn(7, 40)
    with hold.passing(layer):
        used = layer.weight.detach().clone()
        layer(inputs).square().sum().backward()
    taken = (used - (start - 0.4 * start) / 0.6).abs() < 1e-5
    assert 0.3 < taken.float().mean() < 0.5
    theta = own.clone().requires_grad_()
    mixed = (torch.where(taken, start, theta) - 0.4 * start) / 0.6
    torch.testing.assert_close(used, mixed.detach())
    F.linear(inputs, mixed, bias).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(layer.weight.grad, theta.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.weight, own)
    assert torch.equal(layer.bias, bias)


def test_mixout_trains(model: Path, data: Path, tmp_path: Path) -> None:
    assert surgery_train(model, data, tmp_path / "out", "--mixout", "0.3", "--max-steps", "8") == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_lora_is_merged_or_kept_and_both_are_the_same(model: Path, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    assert surgery_train(model, data, tmp_path / "merged", "--lora", "4") == 0
    assert surgery_train(model, data, tmp_path / "kept", "--lora", "4", "--keep-adapter") == 0
    counts = changed(model, tmp_path / "merged")
    linear = {name for name in counts if "_proj" in name}
    assert {name for name, count in counts.items() if count} == linear
    net = AutoModelForCausalLM.from_pretrained(model)
    joined = PeftModel.from_pretrained(net, str(tmp_path / "kept")).merge_and_unload()
    merged = weights(tmp_path / "merged")
    for name, tensor in joined.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-7)
    for name in linear:
        assert torch.linalg.matrix_rank(merged[name] - weights(model)[name], rtol=1e-4) <= 4
    words = [
        "magnitude",
        "--pre",
        str(model),
        "--ft",
        str(tmp_path / "kept"),
        "--sparsity",
        "0",
        "--out",
        str(tmp_path / "edited"),
    ]
    assert main(words) == 0  # an adapter is a checkpoint for the other commands


def test_one_adapter_goes_on_over_all_rounds_and_nothing_is_merged_between(model: Path, tmp_path: Path) -> None:
    """LoraSeqFT: the second round's run is that of the same adapter trained on, beside the start model."""
    tasks = [questions(tmp_path / f"{n}.jsonl", 20, shift=20 * n) for n in range(2)]
    more = ("--lora", "2", "--lr", "3e-2")
    assert surgery_train(model, tasks, tmp_path / "out", *more) == 0
    first = load_file(tmp_path / "out" / "round-1" / "adapter_model.safetensors")
    assert surgery_train(model, tasks, tmp_path / "kept", *more, "--keep-adapter") == 0
    last = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    for name in first:  # more of the same adapter: neither begun anew nor near where it began
        assert not torch.equal(first[name], last[name])
        assert (last[name] - first[name]).norm() < 2 * first[name].norm() + 1
    before, after = weights(model), weights(tmp_path / "out")
    ranks = [torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) for name in before if "_proj" in name]
    assert max(map(int, ranks)) <= 2  # two adapters merged one after the other would have rank 4
    assert report(tmp_path / "out")["continual"] == report(tmp_path / "kept")["continual"]


@pytest.mark.parametrize("option", ["--l1", "--l2"])
def test_a_penalty_on_loras_change_is_that_on_the_whole_matrix(
    model: Path, eight: Path, tmp_path: Path, option: str
) -> None:
    """Three steps of SGD with λ ‖s · B A‖ in the loss, by autograd."""
    from peft import LoraConfig, get_peft_model

    more = (*FULL, "--lora", "4", "--optim", "sgd", "--lr", "1", "--keep-adapter")
    assert surgery_train(model, eight, tmp_path / "out", *more, option, "0.05") == 0
    torch.manual_seed(0)
    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    net = get_peft_model(net, config)
    inputs, labels = batch()
    found = []
    for _ in range(3):
        logits = net(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        found.append(loss.item())
        layers = [module for module in net.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
        changes = [2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
        penalty = sum(change.abs().sum() if option == "--l1" else change.square().sum() for change in changes)
        net.zero_grad()
        (loss + 0.05 * penalty).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    assert losses(tmp_path / "out") == pytest.approx(found, rel=1e-4)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, parameter in net.named_parameters():
        if "lora" in name and option == "--l2":  # the sign of a sum near 0 is rounding's
            torch.testing.assert_close(kept[name.replace(".default", "")], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_hft_freezes_the_factors_of_the_matrices_that_it_draws(model: Path, tmp_path: Path) -> None:
    tasks = [questions(tmp_path / f"{n}.jsonl", 20, shift=20 * n) for n in range(2)]
    out = tmp_path / "out"
    more = ("--lora", "2", "--hft", "0.5", "--keep-adapter", "--warmup", "0")
    assert surgery_train(model, tasks, out, *more) == 0
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (out / "round-1", out))
    rounds = report(out)["rounds"]
    for number, round in enumerate(rounds):
        drawn = choose(weights(model), 0.5, "category", number)
        held = [name for name in first if name.removeprefix("base_model.model.").replace(".lora_B", "") in drawn]
        for name in (name for name in first if "lora_B" in name):  # which begins at zero
            moved = bool(first[name].any()) if number == 0 else not torch.equal(first[name], last[name])
            assert moved == (name not in held), (number, name)
        assert 0 < len(held) < len(first)
        assert 0 < round["frozen"]["trainable"] < 0.1


def test_dpo_starts_at_log_two_and_prefers_what_was_chosen(model: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "data.jsonl",
        [{"prompt": f"w{n % 9} ", "chosen": f"w{20 + n % 5}", "rejected": f"w{40 + n % 5}"} for n in range(40)],
    )
    for more in ((), ("--lora", "4")):
        out = tmp_path / f"out{len(more)}"
        assert surgery_train(model, file, out, "--task", "dpo", "--max-steps", "8", *more) == 0
        found = losses(out)
        assert found[0] == pytest.approx(math.log(2), rel=1e-3)
        assert found[-1] < found[0] - 0.02
        margins = []
        for folder in (model, out):
            net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            logits = net(torch.tensor([ids("w3")])).logits[0, -1]
            margins.append((logits[ids("w23")[0]] - logits[ids("w43")[0]]).item())
        assert margins[1] > margins[0]


def test_a_share_of_older_data_is_trained_on_whatever_its_kind(model: Path, data: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", [{"text": f"w{n} w60"} for n in range(10)])
    turns = [{"role": role, "content": "w1"} for role in ("user", "assistant")]
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns}] * 10)
    more = ("--replay", old, "--replay", chats, "--replay-ratio", "0.2")
    assert surgery_train(model, data, tmp_path / "out", *more) == 0
    (round,) = report(tmp_path / "out")["rounds"]
    assert (round["rows"], round["replayed"]) == (44, 4)


def test_rounds_replay_a_share_of_those_before_and_the_first_has_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [questions(tmp_path / f"{n}.jsonl", 20, shift=10 * n) for n in range(3)]
    old = write(tmp_path / "old.jsonl", [{"text": f"w{n} w79"} for n in range(30)])
    more = ("--replay", "rounds", "--replay", old, "--replay-ratio", "0.1", "--max-steps", "1")
    assert surgery_train(model, tasks, tmp_path / "out", *more) == 0
    rounds = report(tmp_path / "out")["rounds"]
    # A tenth of what is remembered: nothing; 30 older rows and the first round's 19; 30 and 38. One row of each is held out.
    assert [(round["rows"], round["replayed"]) for round in rounds] == [(19, 0), (24, 5), (26, 7)]
    capsys.readouterr()
    assert surgery_train(model, tasks, tmp_path / "planned", *more, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["rounds"]
    assert [round["replayed"] for round in planned] == [0, 5, 7]


def test_a_file_of_settings_is_overruled_by_the_command_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {model}\ndata: {data}\nout: {tmp_path / 'a'}\nlr: 1e-2\nbatch-size: 4\nmax_steps: 2\noptim: lion\n"
    )
    assert main(["train", "--config", str(config), "--optim", "adamw"]) == 0
    found = report(tmp_path / "a")["settings"]
    assert [found[key] for key in ("lr", "batch-size", "max-steps", "optim", "warmup")] == [0.01, 4, 2, "adamw", 0.03]
    # What was saved repeats the run.
    assert main(["train", "--config", str(tmp_path / "a" / "surgery-train.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert not any(changed(tmp_path / "a", tmp_path / "b").values())
    capsys.readouterr()
    for line, complaint in (
        ("learning_rate: 1", "learning_rate is no option"),
        ("epochs: many", "epochs takes a number"),
        ("packing: 1", "packing takes true or false"),
        ("a: [", "is not YAML"),
    ):
        config.write_text(line)
        assert main(["train", "--config", str(config)]) == 1
        assert complaint in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "a" / "surgery-train.yaml").read_text())["optim"] == "adamw"


def test_the_papers_numbers_are_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for default in ("0.15", "2e-5, with LoRA 1e-4, dpo 5e-7", "128, dpo 32", "1024", "cosine", "0.03", "2"):
        assert f"default: {default}]" in text or f"default: ({default})]" in text


def test_continual_rounds_are_scored_on_every_task(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = questions(tmp_path / "1.jsonl"), questions(tmp_path / "2.jsonl", shift=20)
    out = tmp_path / "out"
    more = ("--optim", "hft", "--eval-split", "0.2", "--max-steps", "6")
    assert surgery_train(model, [first, second], out, *more) == 0
    found = report(out)
    scores, continual = found["continual"]["scores"], found["continual"]
    assert continual["op"] == pytest.approx([scores[0][0], (scores[1][0] + scores[1][1]) / 2])
    assert continual["bwt"] == pytest.approx([0.0, (scores[1][0] - scores[0][0]) / 2])
    assert scores[1][1] > scores[0][1] + 0.5  # the second task was learnt
    assert continual["bwt"][1] < 0  # at the cost of the first
    draws = [set(round["frozen"]["tensors"]) for round in found["rounds"]]
    assert draws[0] != draws[1]
    counts = changed(model, out / "round-1")
    assert draws[0] == {name for name, count in counts.items() if not count}
    between = changed(out / "round-1", out)
    assert draws[1] == {name for name, count in between.items() if not count}
    # The score of the second task after the first round, from the checkpoint of that round; the rows are all of one length.
    from surgery.data.rows import read
    from surgery.train.data import hold_out

    net = AutoModelForCausalLM.from_pretrained(out / "round-1", dtype=torch.float32)
    lines = [[*ids(row["prompt"] + row["completion"]), END] for row in hold_out(read(str(second)).rows, 0.2, 0)[1]]
    inputs = torch.tensor(lines)
    logits = net(inputs).logits[:, 3:-1].flatten(0, 1)
    assert scores[0][1] == pytest.approx(-F.cross_entropy(logits, inputs[:, 4:].flatten()).item(), rel=1e-4)
    assert "After round" in capsys.readouterr().out
    assert main(["fapm", "--pre", str(model), "--ft", str(out), "--out", str(tmp_path / "edited")]) == 0
    assert not any(path.is_dir() for path in (tmp_path / "edited").iterdir())


def killed(model: Path, data: list[Path], out: Path, at: int, number: int, *more: str) -> None:
    """Run the command in a process that is killed at a step of a round."""
    words = [
        "train",
        "--model",
        str(model),
        *(word for path in data for word in ("--data", str(path))),
        "--out",
        str(out),
    ]
    script = (
        "import os, signal, sys\nfrom surgery.train.display import Screen\n"
        "def step(self, number, rounds, step, steps, logs):\n"
        f"    if (number, step) == ({number}, {at}): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Screen.step = step\nfrom surgery.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words, *more], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_goes_on_to_the_same_bits(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = questions(tmp_path / "2.jsonl", shift=20)
    numbers = "--lr 1e-2 --batch-size 8 --epochs 1.5 --save-every 2 --optim mofo --hft 0.5 --mixout 0.2".split()
    words = ["train", "--model", str(model), "--data", str(data), "--data", str(second), *numbers]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    killed(model, [data, second], tmp_path / "out", 5, 2, *numbers)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main([*words, "--seed", "1", "--out", str(tmp_path / "out"), "--resume"]) == 1
    assert "differs in seed" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert "Continuing from step 4" in capsys.readouterr().out
    for number in (0, 1):
        assert losses(tmp_path / "out", number) == losses(tmp_path / "whole", number)
        assert len(losses(tmp_path / "out", number)) > 6
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert report(tmp_path / "out")["continual"] == report(tmp_path / "whole")["continual"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.jsonl", "out", "whole"]


@pytest.mark.parametrize("more", [("--lora", "4"), ("--optim", "lion", "--l2", "0.1", "--packing", "--seq-len", "32")])
def test_ctrl_c_leaves_a_state_to_continue_from(
    model: Path,
    data: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from surgery.train.display import Screen

    show = Screen.step

    def press(self: Screen, number: int, rounds: int, step: int, steps: int, logs: dict[str, float]) -> None:
        show(self, number, rounds, step, steps, logs)
        if step == 3:
            raise KeyboardInterrupt

    words = [*more, "--max-steps", "5", "--save-every", "2", "--eval-split", "0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(Screen, "step", press)
        assert surgery_train(model, data, tmp_path / "out", *words) == 130
        assert "Continue with --resume." in capsys.readouterr().out
        assert left(tmp_path) == [".out.surgery-train"]
    assert surgery_train(model, data, tmp_path / "out", *words, "--resume") == 0
    assert left(tmp_path) == ["out"]
    assert surgery_train(model, data, tmp_path / "whole", *words) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert not any(changed(tmp_path / "whole", tmp_path / "out").values())
    # Without a state there is nothing to keep.
    monkeypatch.setattr(Screen, "step", press)
    assert surgery_train(model, data, tmp_path / "again", "--max-steps", "5") == 130
    assert sorted(left(tmp_path)) == ["out", "whole"]


def test_a_loss_that_is_no_number_leaves_the_last_good_state(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--optim", "sgd", "--lr", "1e20", "--clip", "0", "--warmup", "0", "--max-steps", "9", "--batch-size", "2")
    assert surgery_train(model, data, tmp_path / "out", *wild) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: Step \d+: the .* is (nan|inf), so training was stopped\. Lower --lr.*\n", error)
    assert left(tmp_path) == []
    # Some good steps at a rate that grows from nothing, then none.
    growing = (*wild[:-4], "--warmup", "8", "--lr", "1e4", "--max-steps", "9", "--save-every", "1")
    assert surgery_train(model, data, tmp_path / "out", *growing) == 1
    error = capsys.readouterr().err
    (kept,) = re.findall(r"The last good state is kept: (\S+)", error)
    assert not (tmp_path / "out").exists()
    assert all(bool(tensor.isfinite().all()) for tensor in weights(Path(kept)).values())


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--data", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--optim", "adam"), "--optim must be one of adamw, mofo"),
        (("--lr", "0"), "--lr must be greater than 0"),
        (("--batch-size", "6", "--accumulation", "4"), "--accumulation 4 does not divide"),
        (("--hft", "1.5"), "--hft must be between 0 and 1"),
        (("--keep-adapter",), "--keep-adapter needs --lora"),
        (("--lora", "4", "--mixout", "0.1"), "give --lora with --l2 instead"),
        (("--lora", "4", "--freeze", "head"), "nothing to --freeze"),
        (("--replay", "rounds"), "--replay rounds remembers earlier rounds"),
        (("--frozen-attention", "5"), "Lower --frozen-attention"),
        (("--frozen-attention", "2", "--level", "layer"), "--frozen-attention counts matrices of a category"),
        (("--frozen-feed-forward", "1,x"), "--frozen-feed-forward takes whole numbers"),
        (("--optim", "mofo", "--form", "gd", "--filter", "mv"), "--form gd keeps no moments"),
        (("--form", "gd"), "--form gd is a form of MoFO"),
        (("--ewc", "1"), "--ewc needs something to remember"),
        (("--gem", "gem"), "--gem needs something to remember"),
        (("--cofitune", "3:1"), "--cofitune takes the first layer"),
        (("--cofitune", "7:9"), "Layers 7 to 8 have nothing of feed-forward"),
        (("--cofitune", "0:1", "--hft", "0.5"), "both say which tensors are trained"),
        (("--proximal", "1", "--optim", "mofo"), "give --l2 instead"),
        (("--lora", "4", "--soft-mask"), "which an adapter does not train"),
        (("--loss", "dpo"), "--loss must be one of"),
        (("--freeze", "mlp"), "--freeze must be one of"),
        (("--seq-len", "3"), "every prompt alone fills --seq-len 3"),
        (("--task", "dpo"), "known are prompt, chosen, rejected"),
        (("--plot", "scores.png"), "--plot draws the scores of several tasks"),
        (("--plot", "scores.txt", "--data", "missing.jsonl"), "the name must end in .png or .svg"),
        (("--log", "tensorboard"), "--log tensorboard needs it installed"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], complaint: str
) -> None:
    if more[0] == "--log" and __import__("importlib").util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    assert surgery_train(model, data, tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert left(tmp_path) == []


def test_memory_that_runs_out_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        torch.empty(1 << 60)  # torch's own complaint

    monkeypatch.setattr("torch.optim.AdamW.step", fails)
    assert surgery_train(model, data, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith("error: Out of memory. Raise --accumulation")
    assert left(tmp_path) == []


def test_an_output_is_not_overwritten_and_a_model_that_cannot_be_trained_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert surgery_train(model, data, model) == 1
    assert "is inside the input" in capsys.readouterr().err
    assert surgery_train(model, data, data.parent) == 1
    assert "contains the input" in capsys.readouterr().err
    assert surgery_train(tmp_path, data, tmp_path / "out") == 1
    broken = make_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    assert surgery_train(broken, data, tmp_path / "out") == 1
    assert "model.safetensors" in capsys.readouterr().err
    tensors = weights(model)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert surgery_train(broken, data, tmp_path / "out") == 1
    assert "lacks model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_template_that_refuses_the_messages_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = make_model(tmp_path / "model", template="{{ raise_exception('Roles must alternate') }}")
    turns = [{"role": role, "content": "w1"} for role in ("user", "assistant")]
    assert surgery_train(strict, write(tmp_path / "a.jsonl", [{"messages": turns}]), tmp_path / "out") == 1
    assert "cannot render the messages that begin with" in capsys.readouterr().err


def test_rows_are_cut_to_what_the_model_takes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = make_model(tmp_path / "model")
    config = (short / "config.json").read_text()
    (short / "config.json").write_text(
        re.sub(r'"max_position_embeddings": \d+', '"max_position_embeddings": 6', config)
    )
    assert surgery_train(short, data, tmp_path / "out") == 0
    assert "40 of 40 rows are longer than 6 tokens: 40 cut, 0 left out" in capsys.readouterr().out


def test_nothing_goes_out_to_the_network(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    tried = []

    def refuse(*args: Any, **_: Any) -> Any:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    assert surgery_train(model, data, tmp_path / "out", "--save-every", "1") == 0
    assert tried == []


def test_a_generation_config_that_transformers_refuses_to_save_travels(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """temperature without do_sample, as Llama 2 had it."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}))
    assert (
        main(["train", "--model", str(base), "--data", str(data), "--max-steps", "1", "--out", str(tmp_path / "out")])
        == 0
    )
    assert (tmp_path / "out/generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_the_text_part_of_a_multimodal_model_is_trained_and_the_whole_is_written(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    auto: Any = AutoModelForImageTextToText
    base = tmp_path / "base"
    auto.from_config(config).save_pretrained(base)
    before = load_file(base / "model.safetensors")
    before["mtp.layers.0.mlp.up_proj.weight"] = torch.ones(4, 4)
    save_file(before, base / "model.safetensors", {"format": "pt"})
    for path in model.glob("tokenizer*"):
        shutil.copy(path, base)
    words = ["--max-steps", "1", "--batch-size", "4", "--lr", "0.01", "--warmup", "0", "--seq-len", "32"]
    assert main(["train", "--model", str(base), "--data", str(data), *words, "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == before.keys()
    apart = [name for name in before if "vision" in name or "projector" in name or "mtp" in name]
    assert all(torch.equal(after[name], before[name]) for name in apart)
    assert any(
        not torch.equal(after[name], before[name]) for name in before if "self_attn" in name and "vision" not in name
    )
    assert "were not trained" in said
    assert "mtp" in said
    _, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
