"""What `surgery train` leaves: its report, which `surgery verify` reads, the picture of a continual run, odd tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_model import changed, left, losses, make_model, questions, report, surgery_train, weights, write
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from surgery.__main__ import main
from surgery.checkpoint.checksum import Checksum
from surgery.pictures import render
from surgery.train.plot import heat_map


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("results") / "model")


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return questions(model.with_name("data.jsonl"))


def test_the_report_is_every_commands_and_verify_checks_by_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert surgery_train(model, data, out, "--optim", "hft") == 0
    found, counts, after = report(out), changed(model, out), weights(out)
    assert (found["method"], found["output"], found["pre"]["folder"]) == ("train", "out", str(model))
    assert found["command"][:2] == ["surgery", *sys.argv[1:2]]
    assert {line["name"] for line in found["tensors"]} == after.keys()
    for line in found["tensors"]:
        name, checksum = line["name"], Checksum()
        checksum.add(0, after[name].numpy().tobytes())
        assert line["checksum"] == checksum.text()
        assert line["differ"] == counts[name]
        assert line["action"] == ("trained" if counts[name] else "unchanged")
        moved = (after[name] - weights(model)[name]).norm() / weights(model)[name].norm()
        assert line["distance_after"] == pytest.approx(float(moved), rel=1e-5)
    assert sum(group["differ"] for group in found["categories"].values()) == found["totals"]["differ"]
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--pre", str(model), "--ft", str(out)]) == 0
    assert "as its report, pre and ft would have them" in capsys.readouterr().out
    after["model.norm.weight"][0] += 1
    save_file(after, out / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(out)]) == 1
    assert "model.norm.weight has another checksum than the report" in capsys.readouterr().err


def test_an_adapters_report_has_its_own_tensors(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert surgery_train(model, data, tmp_path / "kept", "--lora", "2", "--keep-adapter") == 0
    assert surgery_train(model, data, tmp_path / "merged", "--lora", "2") == 0
    factors = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    found = report(tmp_path / "kept")
    assert {line["name"] for line in found["tensors"]} == factors.keys()
    for key in ("differ", "entries"):
        assert found["totals"][key] == report(tmp_path / "merged")["totals"][key]
    assert main(["verify", str(tmp_path / "kept")]) == 0
    next(iter(factors.values()))[0] += 1
    save_file(factors, tmp_path / "kept" / "adapter_model.safetensors")
    assert main(["verify", str(tmp_path / "kept")]) == 1
    assert "another checksum" in capsys.readouterr().err


def test_a_round_goes_on_from_the_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    """Also where the weights are stored in fewer bits than they are trained in."""
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    same = write(tmp_path / "same.jsonl", [{"question": "w1 w2", "answer": "w3 w4"}] * 20)
    assert surgery_train(model, [same, same], tmp_path / "both", "--optim", "sgd") == 0
    start = tmp_path / "both" / "round-1"
    assert surgery_train(start, same, tmp_path / "second", "--optim", "sgd", "--eval-split", "0.05") == 0
    assert losses(tmp_path / "both", 1) == losses(tmp_path / "second")


def test_scores_of_tasks_are_drawn(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [questions(tmp_path / "first.jsonl", 20), questions(tmp_path / "second$.jsonl", 20, shift=20)]
    out, picture = tmp_path / "out", tmp_path / "scores.svg"
    assert surgery_train(model, tasks, out, "--max-steps", "1", "--plot", picture) == 0
    assert f"Wrote {picture}" in capsys.readouterr().out
    figure = heat_map(report(out))
    (axes,) = figure.axes
    scores = report(out)["continual"]["scores"]
    drawn = axes.images[0].get_array()
    assert drawn is not None
    assert drawn.tolist() == scores
    written = [text.get_text() for text in axes.texts]
    assert written[:4] == [f"{score:.3f}" for row in scores for score in row]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", r"second\$", "OP", "BWT"]
    assert render(figure, "svg") == picture.read_bytes()
    assert sorted(left(tmp_path)) == ["first.jsonl", "out", "scores.svg", "second$.jsonl"]


def test_tokens_that_the_model_does_not_have_are_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"x{number}" for number in range(30)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # number 119 of 99: only ever masked
    tokenizer.save_pretrained(model)
    capsys.readouterr()
    beyond = write(tmp_path / "beyond.jsonl", [{"question": "w1 x20", "answer": "w3"}])
    assert surgery_train(model, beyond, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: The data holds the token 'x20', number 109, and the model's embedding has 99 rows")
    assert error.count("\n") == 1
    uneven = write(tmp_path / "uneven.jsonl", [{"question": "w1 " * n, "answer": "w3"} for n in range(1, 9)])
    assert surgery_train(model, uneven, tmp_path / "out") == 0
    assert surgery_train(make_model(tmp_path / "other"), uneven, tmp_path / "without") == 0  # no padding token at all
    assert losses(tmp_path / "out") == losses(tmp_path / "without")
