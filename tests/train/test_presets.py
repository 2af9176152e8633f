"""`surgery train --preset`: the numbers as the papers print them, and who wins over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny_model import make_model, questions, report

from surgery.__main__ import main
from surgery.train.presets import preset

# Typed off the papers: FAPM §4, HFT A.2.3, MoFO D.3.
FAPM = {"optim": "adamw", "lr": 5e-6, "batch-size": 2}
HFT = {"optim": "hft", "hft": 0.5, "lr": 2e-5, "schedule": "linear", "batch-size": 128}
HFT_ROUNDS = {"optim": "hft", "hft": 0.5, "lr": 1e-5, "schedule": "constant", "batch-size": 128}
MOFO = {
    "optim": "mofo",
    "alpha": 0.15,
    "lr": 2e-5,
    "schedule": "cosine",
    "warmup": 0.03,
}
MOFO_ROUNDS = {"optim": "mofo", "alpha": 0.05, "lr": 1e-5, "schedule": "cosine", "batch-size": 64}


def trained(places: tuple[Path, Path], out: Path, *words: str) -> int:
    model, data = places
    return main(["train", "--model", str(model), "--data", str(data), "--out", str(out), *words])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("presets")
    return make_model(base / "model"), questions(base / "data.jsonl", 4)


@pytest.mark.parametrize(
    ("name", "rounds", "expected"),
    [("fapm", 1, FAPM), ("hft", 1, HFT), ("mofo", 1, MOFO), ("hft", 2, HFT_ROUNDS), ("mofo", 2, MOFO_ROUNDS)],
)
def test_a_preset_is_the_papers_settings(
    places: tuple[Path, Path], name: str, rounds: int, expected: dict[str, object], tmp_path: Path
) -> None:
    more = [word for _ in range(rounds - 1) for word in ("--data", str(places[1]))]
    assert trained(places, tmp_path / "out", "--preset", name, "--max-steps", "1", *more) == 0
    written = yaml.safe_load((tmp_path / "out" / "surgery-train.yaml").read_text())
    assert {key: written[key] for key in expected} == expected


def test_fapm_trains_for_three_epochs(places: tuple[Path, Path], tmp_path: Path) -> None:
    assert trained(places, tmp_path / "out", "--preset", "fapm") == 0
    assert len(report(tmp_path / "out")["rounds"][0]["steps"]) == 4 * 3 // 2


def test_lengths_beyond_the_tiny_model() -> None:
    assert [preset(name, dpo=False, rounds=1)["seq_len"] for name in ("hft", "mofo")] == [4096, 1024]
    assert preset("hft", dpo=True, rounds=1) == {"optim": "hft", "lr": 5e-7, "batch_size": 32, "seq_len": 4096}


def test_the_eight_tasks_of_trace_have_epochs_of_their_own() -> None:
    assert [preset(name, dpo=False, rounds=8)["epochs"] for name in ("hft", "mofo")] == [(5, 3, 7, 5, 3, 5, 5, 7)] * 2
    assert "epochs" not in preset("mofo", dpo=False, rounds=2)


def test_what_is_given_wins_over_a_preset(places: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\nbatch-size: 4\nlr: 1.0e-3\n")
    words = ("--preset", "fapm", "--config", str(tmp_path / "mine.yaml"), "--lr", "2e-3", "--max-steps", "1")
    assert trained(places, tmp_path / "out", *words) == 0
    written = yaml.safe_load((tmp_path / "out" / "surgery-train.yaml").read_text())
    assert (written["lr"], written["batch-size"], written["seed"]) == (2e-3, 4, 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("adam",), "--preset takes fapm, hft, mofo, not 'adam'."),
        (("fapm", "--task", "dpo"), "--preset fapm: its paper (FAPM §4) trains on no preferences."),
    ],
)
def test_a_preset_that_there_is_not_is_one_sentence(
    places: tuple[Path, Path],
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trained(places, tmp_path / "out", "--preset", *words) == 1
    assert sentence in " ".join(capsys.readouterr().err.split())
