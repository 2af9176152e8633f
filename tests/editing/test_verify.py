"""`surgery verify`: what is wrong with a checkpoint is found and named; what is right passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Q, fine_tuned, read_checkpoint, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import run
from helpers.runs import METHOD_OPTIONS
from safetensors.torch import load_file, save_file

from surgery.checkpoint.checksum import Checksum

FIRST = "model.embed_tokens.weight"
REPORT = "surgery-report.json"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What fapm makes of a tiny pair."""
    tiny_llama_pair(tmp_path, shards=1)
    assert run("fapm", "--pre", tmp_path / "pre", "--ft", tmp_path / "ft", "--out", tmp_path / "out") == 0
    return tmp_path / "out"


def verdict(out: Path, capsys: pytest.CaptureFixture[str], *, inputs: bool) -> tuple[int, str]:
    words = ("--pre", out.parent / "pre", "--ft", out.parent / "ft") if inputs else ()
    capsys.readouterr()
    status = run("verify", out, *words)
    said = capsys.readouterr()
    assert len((said.err or said.out).strip().splitlines()) == 1
    return status, said.err or said.out


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_what_surgery_writes_is_right(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama_pair(tmp_path)
    words = ("--pre", tmp_path / "pre", "--ft", tmp_path / "ft", "--out", tmp_path / "out")
    assert run(method, *words, *METHOD_OPTIONS[method]) == 0
    assert verdict(tmp_path / "out", capsys, inputs=False)[0] == 0
    assert verdict(tmp_path / "out", capsys, inputs=True)[0] == 0


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of the checkpoint and save it again."""
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def rereport(out: Path, name: str, **values: Any) -> None:
    """Change a tensor's line of the report."""
    report = json.loads((out / REPORT).read_text())
    next(line for line in report["tensors"] if line["name"] == name).update(values)
    (out / REPORT).write_text(json.dumps(report))


@pytest.mark.parametrize("bit", [0, 7, 8 * 100 + 3])
def test_one_bit_is_noticed(bit: int, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q].view(torch.uint8).view(-1)[bit // 8] ^= 1 << bit % 8

    rewrite(out, flip)
    status, said = verdict(out, capsys, inputs=False)
    assert (status, Q in said, "checksum" in said) == (1, True, True)


def test_two_entries_that_changed_places_are_noticed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[Q].view(-1)
        flat[[0, 200]] = flat[[200, 0]]

    rewrite(out, swap)
    assert verdict(out, capsys, inputs=False)[0] == 1


def test_the_first_wrong_tensor_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = list(read_checkpoint(out))
    rewrite(out, lambda tensors: [tensor.add_(1) for name, tensor in tensors.items() if name in (Q, "lm_head.weight")])
    _, said = verdict(out, capsys, inputs=True)
    assert min(Q, "lm_head.weight", key=order.index) in said
    assert "1 more" in said


def checksum(tensor: torch.Tensor) -> str:
    found = Checksum()
    found.add(0, tensor.contiguous().view(torch.uint8).view(-1).numpy())
    return found.text()


def test_an_entry_of_neither_model_is_found_even_with_the_right_checksum(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(out, lambda tensors: tensors[Q][2, 5:7].fill_(7.0))
    rereport(out, Q, checksum=checksum(read_checkpoint(out)[Q]))
    assert verdict(out, capsys, inputs=False)[0] == 0
    status, said = verdict(out, capsys, inputs=True)
    assert (status, Q in said, "2 entries that are neither" in said) == (1, True, True)


@pytest.mark.parametrize(("field", "by"), [("kept", 60), ("pruned", 60), ("differ", 1)])
def test_counts_that_are_not_as_reported(field: str, by: int, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((out / REPORT).read_text())
    line = next(line for line in report["tensors"] if line["name"] == Q)
    rereport(out, Q, **{field: line[field] + by})
    status, said = verdict(out, capsys, inputs=True)
    assert (status, Q in said, "the report says" in said) == (1, True, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda out: (out / REPORT).unlink(), REPORT),
        (lambda out: (out / REPORT).write_text("{}"), REPORT),
        (lambda out: rewrite(out, lambda tensors: tensors.pop(Q)), Q),
        (lambda out: rewrite(out, lambda tensors: tensors.update(extra=torch.ones(1))), "extra"),
        (lambda out: rewrite(out, lambda tensors: tensors.update({Q: tensors[Q].float()})), Q),
        (
            lambda out: (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1]),
            "truncated",
        ),
    ],
)
def test_a_folder_that_is_not_what_the_report_says(
    change: Callable[[Path], object], named: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(out)
    status, said = verdict(out, capsys, inputs=False)
    assert (status, named in said) == (1, True)


def test_other_models_than_it_was_made_from(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(out.parent / "other", fine_tuned(tiny_llama(), seed=5))
    assert run("verify", out, "--pre", out.parent / "pre", "--ft", out.parent / "other") == 1
    assert "neither" in capsys.readouterr().err
    assert run("verify", out, "--pre", out.parent / "pre") == 1
    assert "go together" in capsys.readouterr().err
    assert run("verify", out.parent / "nothing") == 1
    assert "no such folder" in capsys.readouterr().err
    assert run("verify", out.parent / "ft") == 1
    assert "surgery did not write" in capsys.readouterr().err
