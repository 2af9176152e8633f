"""Tasks' own tests: what a training says of them is what the checkpoint scores that it wrote, and asking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_lm import one_thread as one_thread
from helpers.tiny_model import losses, make_model, report, surgery_train, weights, write

import surgery
from surgery.__main__ import main
from surgery.train.report import continual
from surgery.train.settings import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("exam") / "model")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tasks that have the same questions and other answers."""
    folder = tmp_path_factory.mktemp("tasks")
    answers = {"first": "w20 w30", "second": "w50 w60"}
    return [
        write(folder / f"{name}.jsonl", [{"question": f"w{n % 9}", "answer": answer} for n in range(16)])
        for name, answer in answers.items()
    ]


SHORT = ("--max-new-tokens", "3")


def test_scores_after_each_round_are_those_of_the_checkpoints(
    model: Path, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = [f"{two[0]}:rouge-l", f"{two[1]}:f1"]
    tests = [word for spec in specs for word in ("--eval-data", spec)]
    assert surgery_train(model, two, tmp_path / "out", "--max-steps", "20", *tests, *SHORT) == 0
    found = report(tmp_path / "out")["continual"]
    for round, folder in enumerate((tmp_path / "out/round-1", tmp_path / "out")):
        there = surgery.evaluate(str(folder), specs, max_new_tokens=3)
        assert found["scores"][round] == pytest.approx([scores.value for scores in there.values()], abs=1e-12)
    (own, before), (kept, after) = found["scores"]
    assert own > kept  # the first task was learnt, and forgotten
    assert after > before
    assert found["op"] == pytest.approx([own, (kept + after) / 2])
    assert found["bwt"] == pytest.approx([0.0, (kept - own) / 2])
    assert [task["name"] for task in found["tasks"]] == ["first", "second"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Scores are the tasks' own: first by rouge-l, second by f1. BWT below 0 is forgetting." in shown
    assert report(tmp_path / "out")["rounds"][0]["held_out"] == 0  # nothing is taken from the data


def test_asking_on_the_way_changes_nothing(model: Path, two: list[Path], tmp_path: Path) -> None:
    more = ("--max-steps", "6", "--optim", "mofo", "--filter", "random")
    tests = ("--eval-data", f"{two[0]}:exact", "--eval-every", "2", "--eval-limit", "5", *SHORT)
    assert surgery_train(model, two[0], tmp_path / "asked", *more, *tests) == 0
    assert surgery_train(model, two[0], tmp_path / "not", *more) == 0
    asked, other = weights(tmp_path / "asked"), weights(tmp_path / "not")
    assert all(asked[name].equal(other[name]) for name in other)
    assert losses(tmp_path / "asked") == losses(tmp_path / "not")
    (round,) = report(tmp_path / "asked")["rounds"]
    assert [one["step"] for one in round["scores"]] == [2, 4, 6]
    assert round["scores"][-1]["scores"] == report(tmp_path / "asked")["continual"]["scores"][0]
    assert report(tmp_path / "not")["continual"] is None


def test_without_a_test_the_score_is_minus_the_loss_and_that_is_said(
    model: Path, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert surgery_train(model, two, tmp_path / "out", "--max-steps", "1") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Scores are minus the loss of held-out answers, for want of another" in shown
    assert "with --eval-data FILE:METRIC" in shown
    assert max(map(max, report(tmp_path / "out")["continual"]["scores"])) < 0


def test_op_and_bwt_are_those_of_hft() -> None:
    """A.2.2, written out on a table made up."""
    scores = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.1], [0.6, 0.5, 0.4]]
    found = continual(scores)
    assert found["op"] == pytest.approx([0.9, (0.7 + 0.8) / 2, (0.6 + 0.5 + 0.4) / 3])
    assert found["bwt"] == pytest.approx([0.0, (0.7 - 0.9) / 2, ((0.6 - 0.9) + (0.5 - 0.8)) / 3])


def test_each_round_has_its_epochs_and_rows(
    model: Path, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write(tmp_path / "more.jsonl", [{"question": "w1", "answer": "w2"}] * 48)
    words = ["train", "--model", str(model), "--data", str(two[0]), "--data", str(more), "--out", str(tmp_path / "out")]
    words += ["--epochs", "2,1", "--batch-size", "8", "--sample", "16", "--eval-split", "0"]
    assert main(words) == 0
    rounds = report(tmp_path / "out")["rounds"]
    assert [len(round["steps"]) for round in rounds] == [4, 2]
    assert [round["rows"] for round in rounds] == [16, 16]
    assert "48 records, 16 drawn" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/surgery-report.json").read_bytes())["settings"]["epochs"] == [2.0, 1.0]


def test_rows_that_are_too_long_are_left_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w1", "completion": " w2" * n} for n in (1, 2, 3, 4)] * 2
    file = write(tmp_path / "long.jsonl", rows)
    assert surgery_train(model, file, tmp_path / "out", "--max-chars", "8") == 0
    assert report(tmp_path / "out")["rounds"][0]["rows"] == 4
    assert "Left out: 4 too long." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--eval-data", "{0}:exact"), "--eval-data is given 1 times, and --data 2 times"),
        (("--eval-data", "{0}:exact", "--eval-data", "gone.jsonl"), "gone.jsonl: no such file"),
        (("--eval-data", "{0},{1}", "--eval-data", "{1}"), "names 2 measures, and a task has one score"),
        (("--eval-data", "{0}", "--eval-data", "self"), "compares a model with its base"),
        (("--eval-limit", "3"), "--eval-limit is of --eval-data"),
        (("--eval-split", "0", "--eval-every", "3"), "--eval-every needs something to evaluate on"),
        (("--epochs", "1,2,3"), "--epochs has 3 numbers, and there are 2 --data"),
        (("--epochs", "two"), "--epochs takes numbers with commas between them"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_read(
    model: Path, two: list[Path], tmp_path: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(*two) for word in more]
    assert surgery_train(model, two, tmp_path / "out", *words) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_know_the_epochs_of_each_round(tmp_path: Path) -> None:
    settings = Settings(model="m", data=("a.jsonl", "b.jsonl"), out=tmp_path, epochs=(5.0, 3.0))
    assert [settings.epochs_of(number) for number in (1, 2)] == [5.0, 3.0]
    assert Settings(model="m", data=("a.jsonl", "b.jsonl"), out=tmp_path).epochs_of(2) == 2.0
