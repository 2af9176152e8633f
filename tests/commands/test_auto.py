"""`surgery auto` from the command line and from Python, on tiny models: what is written is what the shown commands write."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_lm import make_lm
from helpers.tiny_lm import one_thread as one_thread
from safetensors.torch import load_file, save_file

import surgery
from surgery.__main__ import main
from surgery.api import Edit
from surgery.errors import OptionError
from surgery.methods import METHODS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pre; ft, which is pre after a few steps on the task; and the task."""
    root = tmp_path_factory.mktemp("auto")
    make_lm(root / "pre", bos=True)
    rows = [{"question": f"How many ducks lay {n} eggs?", "answer": f"{n} ducks. #### {n}"} for n in range(40)]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _train(root / "pre", root / "ft", [f"Question: {row['question']}\nAnswer: {row['answer']}</s>" for row in rows])
    return root


def _train(pre: Path, ft: Path, texts: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(pre), AutoModelForCausalLM.from_pretrained(pre)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(12):
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts[step % 8 :: 8]]
        sum(model(input_ids=one, labels=one).loss for one in ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(ft)
    tokenizer.save_pretrained(ft)


def run(root: Path, *words: str) -> int:
    return main(
        ["auto", "--pre", str(root / "pre"), "--ft", str(root / "ft"), "--task", str(root / "task.jsonl"), *words]
    )


def options(root: Path, tmp_path: Path) -> list[str]:
    return ["--general", "self", "--limit", "24", "--out", str(tmp_path / "best")]


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "best-report" / "results.json").read_bytes())
    return found


def test_the_winner_is_what_the_commands_write(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, *options(root, tmp_path), "--max-forgetting", "0.2", "--method", "fapm,hma") == 0
    printed = capsys.readouterr()
    found = results(tmp_path)["auto"]
    assert f"Wrote {tmp_path / 'best'}" in printed.out
    assert found["sentence"] in printed.out
    assert "is proved at 95%" in found["sentence"]
    (words,) = found["commands"]
    assert shlex.join(words) in printed.out
    assert main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "best" / "model.safetensors"
    ).read_bytes()
    assert found["sentence"] in (tmp_path / "best" / "README.md").read_text()
    assert found["sentence"].split(" keeps")[0] in (tmp_path / "best-report" / "index.html").read_text()
    assert printed.err.splitlines()[0].split() == ["Round", "Left", "Items", "Ahead", "Kept", "Forgot", "To", "go"]
    assert (
        max(map(len, [*printed.out.split("Without the search")[0].splitlines()[:12], *printed.err.splitlines()])) <= 80
    )


def test_a_combination_is_written_as_its_two_commands_write_it(root: Path, tmp_path: Path) -> None:
    from surgery.commands.auto import _write
    from surgery.commands.shared import Checks
    from surgery.comparison.auto import Found
    from surgery.comparison.candidates import averaged
    from surgery.comparison.grid import command_words
    from surgery.editing.job import prepare
    from surgery.methods import Fapm

    pre, ft = str(root / "pre"), str(root / "ft")
    job = prepare(pre, ft, Fapm(), out=tmp_path / "best")
    found = averaged(job, lambda method: command_words(method, pre, ft), out=job.out)
    one = next(candidate for candidate in found if candidate.label == "fapm 0.75, hma 0.4")
    document = {"auto": {"sentence": "It won."}, "command": []}
    assert _write(Found(document, one), job, Checks()) == f"Wrote {tmp_path / 'best'}"
    first, second = one.commands
    assert main(list(first[1:])) == 0
    assert main([*second[1:], "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "best" / "model.safetensors"
    ).read_bytes()


def test_without_a_limit_the_knee_and_a_second_run_from_the_cache(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--cache", str(tmp_path / "cache"), "--limit", "16", "--method", "magnitude,half-reset", "--json"]
    out = ["--out", str(tmp_path / "best")]
    assert run(root, *words, *out) == 0
    first = json.loads(capsys.readouterr().out)
    assert [measure["name"] for measure in first["measures"]] == ["task", "self"]
    assert "the best trade-off of all that was tried" in first["auto"]["sentence"]
    monkeypatch.setattr("surgery.evaluation.bench.Bench._load", None)  # no model is asked again
    assert run(root, *words, *out, "--force") == 0
    second = json.loads(capsys.readouterr().out)
    for key in ("winner", "candidates", "tests"):
        assert first["auto"][key] == second["auto"][key]


def test_nothing_within_the_limit_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--min-retention", "1", "--method", "magnitude", "--report", str(tmp_path / "best-report")]
    # ft keeps all of its own task score, but a limit that nothing can be better than is never proved.
    assert run(root, *options(root, tmp_path), *words) == 1
    printed = capsys.readouterr()
    assert "No model could be proved to be one that keeps at least 100.00%" in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "best").exists()
    assert results(tmp_path)["auto"]["winner"] is None
    assert (tmp_path / "best-report" / "race.svg").exists()


def test_ctrl_c_says_how_the_race_stood_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.comparison.auto.Search.prove", stop)
    assert run(root, *options(root, tmp_path), "--max-forgetting", "0.2", "--method", "hma") == 130
    printed = capsys.readouterr()
    assert "It was stopped before anything was proved, and nothing was written. Ahead was hma" in printed.out
    assert not (tmp_path / "best").exists()


def test_a_further_checkpoint_may_win(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perfect = tmp_path / "perfect"
    perfect.mkdir()
    for path in (root / "ft").iterdir():
        (perfect / path.name).write_bytes(path.read_bytes())
    pre, ft = (load_file(root / name / "model.safetensors") for name in ("pre", "ft"))
    save_file({name: 0.5 * (pre[name] + ft[name]) for name in ft}, perfect / "model.safetensors", {"format": "pt"})
    words = ["--method", "half-reset", "--max-forgetting", "0.9"]
    assert run(root, *options(root, tmp_path), *words, f"mofo={perfect}") == 0
    candidates = {one["label"]: one for one in results(tmp_path)["auto"]["candidates"]}
    assert candidates["mofo"]["round"] >= 1
    assert candidates["mofo"]["method"] is None
    capsys.readouterr()


def test_a_dry_run_lists_what_would_be_tried(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, *options(root, tmp_path), "--dry-run") == 0
    printed = capsys.readouterr().out
    for name in METHODS:
        assert f" {name} " in printed or METHODS[name].calibrated or METHODS[name].slow
    assert "dg-hard was not tried, since an edit takes longer than a score" in " ".join(printed.split())
    assert "wanda was not tried, since it needs a text: --calibration" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-forgetting", "0.1", "--min-retention", "0.9"], "Give --max-forgetting or --min-retention, not both"),
        (["--max-forgetting", "2"], "--max-forgetting must be a share, such as 0.01, not 2.0"),
        (["--time", "soon"], "--time takes a time such as 90s, 30m or 2h, not 'soon'"),
        (["--method", "magic"], "--method takes "),
        (["--method", "fapm,wanda"], "wanda needs a text, --calibration, or norms that were kept, --norms"),
        (["--limit", "4"], "task: has 4 items, and to choose on one half and prove on the other takes 8 or more"),
    ],
)
def test_what_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(root, *options(root, tmp_path), *words) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "best").exists()


def test_two_models_that_are_the_same_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, *options(root, tmp_path), "--ft", str(root / "pre")) == 1
    assert "pre and ft hold the same weights, so there is nothing to repair" in " ".join(
        capsys.readouterr().err.split()
    )


def test_from_python(root: Path, tmp_path: Path) -> None:
    pair = surgery.open_pair(root / "pre", root / "ft")
    best = surgery.auto(
        pair,
        task=root / "task.jsonl",
        limit=24,
        max_forgetting=0.2,
        methods=["fapm", "hma"],
        models={"untouched": root / "ft"},
    )
    assert "That it forgets at most 20.00% is proved at 95%" in best.sentence
    assert isinstance(best.model, Edit)
    assert "untouched" in [one["label"] for one in best.document["auto"]["candidates"]]
    with pytest.raises(OptionError, match="There is nothing to try"):
        surgery.auto(pair, task=root / "task.jsonl", methods=["wanda"])
