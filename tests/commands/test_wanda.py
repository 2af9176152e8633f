"""`surgery wanda`, from text to checkpoint: against the formula, against locuslab/wanda's procedure, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, read_checkpoint
from helpers.families import FAMILIES
from helpers.reference.formulas import kept, pruned, same_bits, task_vector
from helpers.reference.wanda import WrappedLayer, mask
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from surgery.__main__ import main
from surgery.calibrate.text import samples
from surgery.demo.tokens import TOKEN_ID, tokenizer

SPARSITY = 0.75
SETTINGS = ["--samples", "3", "--seq-len", "24", "--seed", "2"]
TEXT = " ".join(list(TOKEN_ID)[place * place % len(TOKEN_ID)] for place in range(200))


def make_pair(root: Path, family: str, dtype: torch.dtype = torch.float32) -> None:
    """A tiny model, a fine-tune of it, both with a tokenizer of letters, and a text."""
    model = FAMILIES[family].build(seed=1, dtype=dtype)
    for side in ("pre", "ft"):
        model.save_pretrained(root / side)
        tokenizer().save_pretrained(root / side)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(dtype))
    (root / "text.txt").write_text(TEXT)


def wanda(root: Path, *words: object) -> int:
    sides = ("--pre", root / "pre", "--ft", root / "ft", "--out", root / "out", "--sparsity", SPARSITY)
    return main(["wanda", *map(str, (*sides, *SETTINGS, *words))])


def inputs(root: Path) -> dict[str, torch.Tensor]:
    """What goes into every linear module of ft, [samples, tokens, k], by the name of its weight."""
    tokens, _ = samples(str(root / "text.txt"), root / "ft", count=3, length=24, seed=2)
    model = AutoModelForCausalLM.from_pretrained(root / "ft", dtype="auto")
    model.train(False)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args: seen.__setitem__(f"{name}.weight", args[0].detach())

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        model(input_ids=tokens)
    return seen


def literal(pre: torch.Tensor, ft: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """METHODS, row by row."""
    return torch.stack(
        [pruned(p, f, kept(abs(task_vector(p, f)) * norms.numpy(), SPARSITY)) for p, f in zip(pre, ft, strict=True)]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma"])
def test_against_the_formula_with_norms_from_hooks(family: str, tmp_path: Path) -> None:
    make_pair(tmp_path, family)
    assert wanda(tmp_path, "--calibration", tmp_path / "text.txt", "--save-norms", tmp_path / "n.safetensors") == 0
    pre, ft, out = (read_checkpoint(tmp_path / name) for name in ("pre", "ft", "out"))
    stored, seen = load_file(tmp_path / "n.safetensors"), inputs(tmp_path)
    report = json.loads((tmp_path / "out/surgery-report.json").read_text())
    checked = 0
    for name, given in seen.items():
        place = name if name in ft else next((key for key in ft if "wte" in key or "embed_tokens" in key), "")
        norms = given.reshape(-1, given.shape[-1]).double().square().sum(0).sqrt()
        torch.testing.assert_close(stored[f"{place}:values"].double(), norms, rtol=1e-5, atol=1e-8)
        before, after, made = pre[place], ft[place], out[place]
        if family == "gpt2" and place != "transformer.wte.weight":  # Conv1D, [in, out]
            before, after, made = before.T.contiguous(), after.T.contiguous(), made.T.contiguous()
        assert same_bits(made, literal(before, after, stored[f"{place}:values"])), place
        checked += 1
    assert checked == len(seen) > 12
    calibration = report["parameters"]["calibration"]
    assert (calibration["samples"], calibration["length"], calibration["seed"]) == (3, 24, 2)
    alone = {name for name in ft if ft[name].ndim == 2} - {name.removesuffix(":values") for name in stored}
    assert all(any(name in note and "|Δ| alone" in note for note in report["notes"]) for name in alone)


def test_against_the_procedure_of_its_authors(tmp_path: Path) -> None:
    make_pair(tmp_path, "llama")
    assert wanda(tmp_path, "--calibration", tmp_path / "text.txt") == 0
    pre, ft, out = (read_checkpoint(tmp_path / name) for name in ("pre", "ft", "out"))
    seen = inputs(tmp_path)
    for name, given in seen.items():
        wrapped = WrappedLayer(given.shape[-1])
        for sample in given:
            wrapped.add_batch(sample[None])
        goes = mask(ft[name] - pre[name], wrapped, SPARSITY)
        assert same_bits(out[name], torch.where(goes, pre[name], ft[name])), name


def test_norms_that_were_kept_give_the_same_bytes_and_no_text_is_needed(tmp_path: Path) -> None:
    make_pair(tmp_path, "llama", torch.bfloat16)
    norms = tmp_path / "n.safetensors"
    assert wanda(tmp_path, "--calibration", tmp_path / "text.txt", "--save-norms", norms) == 0
    first = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "text.txt").unlink()
    assert wanda(tmp_path, "--norms", norms, "--force") == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == first


def test_a_mixture_with_an_expert_that_saw_no_token(tmp_path: Path) -> None:
    make_pair(tmp_path, "mixtral")
    (tmp_path / "text.txt").write_text("a " * 20)
    words = ("--calibration", tmp_path / "text.txt", "--samples", "1", "--seq-len", "2")
    assert wanda(tmp_path, *words, "--save-norms", tmp_path / "n.safetensors") == 0
    stored = load_file(tmp_path / "n.safetensors")
    unseen = [
        name.removesuffix(":tokens") for name, tokens in stored.items() if name.endswith("tokens") and not tokens.any()
    ]
    assert unseen
    pre, ft, out = (read_checkpoint(tmp_path / name) for name in ("pre", "ft", "out"))
    notes = json.loads((tmp_path / "out/surgery-report.json").read_text())["notes"]
    assert any(f"experts that saw no token, {len(unseen)} in all" in note for note in notes)
    for name in unseen:
        assert same_bits(out[name], literal(pre[name], ft[name], torch.ones(ft[name].shape[1])))


def changed(root: Path) -> Tensors:
    """ft with one other number."""
    tensors = load_file(root / "ft/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    return tensors


def test_norms_of_other_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    make_pair(tmp_path, "llama")
    norms = tmp_path / "n.safetensors"
    assert wanda(tmp_path, "--calibration", tmp_path / "text.txt", "--save-norms", norms) == 0
    save_file(changed(tmp_path), tmp_path / "ft/model.safetensors", {"format": "pt"})
    assert wanda(tmp_path, "--norms", norms, "--force") == 1
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Give a text with --calibration"),
        (("--calibration", "none.txt"), "none.txt"),
        (("--calibration", "text.txt", "--samples", "0"), "--samples must be at least 1"),
        (("--calibration", "text.txt", "--batch-size", "0"), "--batch-size must be 1 or more"),
        (("--calibration", "text.txt", "--save-norms", "no/where.safetensors"), "--save-norms"),
        (("--calibration", "text.txt", "--group", "column"), "--group must be one of row, tensor"),
        (("--norms", "text.txt"), "text.txt"),
    ],
)
def test_what_is_refused_leaves_nothing(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_pair(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert wanda(tmp_path, *words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "pre", "text.txt"]


def test_a_dry_run_gives_a_bound_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path, "llama")
    assert wanda(tmp_path, "--calibration", tmp_path / "text.txt", "--dry-run") == 0
    assert "Calibration keeps at most" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
