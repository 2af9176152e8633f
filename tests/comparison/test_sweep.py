"""`surgery sweep`, `--sparsity auto` and `hma --optimize` on a tiny pair, from the command line to the files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import SURGERY, is_one_sentence
from helpers.families import FAMILIES

from surgery.__main__ import main
from surgery.comparison.field import deal
from surgery.comparison.grid import command_words, interleaved, label, numbers, settings, whole_numbers
from surgery.demo.tokens import tokenizer
from surgery.errors import OptionError
from surgery.evaluation.measures.perplexity import Perplexity
from surgery.methods import Dare, Fapm, HalfReset, Hma, Method
from surgery.methods.hma import PAPER
from surgery.methods.scope import Scope

SCORES = ("--task", "task.txt", "--general", "general.txt", "--seq-len", "24", "--cache", "cache")


def text_of(model: Any, seed: int) -> str:
    """What a model says: it finds it likelier than its neighbours do."""
    torch.manual_seed(seed)
    words = tokenizer()
    # Words alone, so that what is read is what was spoken.
    others = [*range(3), *range(len(words), model.config.vocab_size)]
    spoken = model.generate(
        torch.randint(3, 40, (12, 4)),
        max_new_tokens=44,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        eos_token_id=98,
        suppress_tokens=others,
    )
    return "\n".join(str(words.decode(line, skip_special_tokens=True)) for line in spoken)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, a task that ft knows, and a text that pre knows."""
    root = tmp_path_factory.mktemp("pair")
    model = FAMILIES["llama"].build(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.lm_head.weight.mul_(2)
    generator = torch.Generator().manual_seed(5)
    for side, text in (("pre", "general.txt"), ("ft", "task.txt")):
        if side == "ft":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / side)
        tokenizer().save_pretrained(root / side)
        (root / text).write_text(text_of(model, 7))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with the pair and the cache that all tests share."""
    for name in ("pre", "ft"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("task.txt", "general.txt"):
        (tmp_path / name).symlink_to(made / name)
    (made / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache").symlink_to(made / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the document and what is on standard error."""
    capsys.readouterr()
    code = main(["sweep", "--pre", "pre", "--ft", "ft", *SCORES, "--json", *words])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def files(folder: Path) -> dict[str, bytes]:
    """The weights of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


HMA = ("--method", "hma", "--ratios", "0:1:0.125")


def test_a_choice_is_made_on_one_half_proved_on_the_other_and_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, err = sweep(capsys, *HMA, "--choose", "forgetting<=0.5", "--out", "out")
    assert (code, err) == (0, "")
    choice = found["choice"]
    assert found["notes"][-1] == choice["sentence"]
    rows = {row["label"]: row for row in found["rows"] if row["role"] == "other"}
    assert list(rows) == [
        f"hma {ratio}" for ratio in ("0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "1")
    ]
    # The claim is about windows that were not chosen on: there it can be computed by hand.
    prove = deal({name: len(held["weights"]) for name, held in found["items"].items()}, 0).prove["general"]
    items = found["items"]["general"]
    loss = {
        label: np.average(np.array(items["values"][label])[prove], weights=np.array(items["weights"])[prove])
        for label in ("pre", choice["winner"])
    }
    forgot = 1 - np.exp(loss["pre"] - loss[choice["winner"]])
    assert f"forgets {100 * forgot:.2f}%" in choice["sentence"]
    assert forgot < 0.5
    assert "That it forgets at most 50.00% is proved at 95%" in choice["sentence"]
    # The command that is shown writes the same bytes as --out.
    (command,) = choice["commands"]
    assert command[:6] == ["surgery", "hma", "--pre", "pre", "--ft", "ft"]
    assert main([*command[1:-1], "again"]) == 0
    assert files(root / "out") == files(root / "again")
    report = json.loads((root / "out/surgery-report.json").read_text())
    assert report["command"] == command
    assert choice["sentence"] in report["notes"]


def test_nothing_is_scored_twice_and_a_row_is_the_checkpoint(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "--method",
        "half-reset,dare,ties,magnitude",
        "--ratio",
        "0.5",
        "--seed",
        "0,1",
        "--drop-rate",
        "0.5",
        "--sparsity",
        "0.5",
    )
    _, first, _ = sweep(capsys, *words)
    assert [row["label"] for row in first["rows"]] == [
        *(
            "pre",
            "ft",
            "half-reset 0.5",
            "half-reset 0.5 seed 1",
            "dare 0.5",
            "dare 0.5 seed 1",
            "ties 0.5",
            "magnitude 0.5",
        ),
    ]
    scored: list[None] = []
    real = Perplexity.score

    def count(self: Perplexity, *given: Any) -> Any:
        scored.append(None)
        return real(self, *given)

    monkeypatch.setattr(Perplexity, "score", count)
    _, second, _ = sweep(capsys, *words)
    assert (scored, second["rows"]) == ([], first["rows"])
    _, third, _ = sweep(capsys, *words[:-1], "0.5,0.625")
    assert len(scored) == 2  # task and general, once: with one ft, ties is magnitude pruning
    # Scored from files, a checkpoint has the row's fingerprint and nothing is left to score.
    row = next(row for row in third["rows"] if row["label"] == "magnitude 0.625")
    assert main([*row["command"][1:], "--out", "written"]) == 0
    capsys.readouterr()
    assert main(["compare", "--pre", "pre", "--ft", "ft", "written", *SCORES, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["rows"][2]
    assert len(scored) == 2
    same = ("fingerprint", "scores", "retention", "forgetting", "effective_sparsity")
    assert {name: compared[name] for name in same} == {name: row[name] for name in same}


def test_the_seed_of_a_draw_is_not_that_of_the_calibration(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--method", "half-reset,wanda", "--ratio", "0.5", "--seed", "0,1", "--sparsity", "0.5")
    code, found, err = sweep(capsys, *words, "--calibration", "task.txt", "--samples", "2")
    assert (code, err) == (0, "")
    labels = [row["label"] for row in found["rows"]]
    assert labels[2:] == ["half-reset 0.5", "half-reset 0.5 seed 1", "wanda 0.5"]


def test_the_levels_of_half_reset_are_swept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--method", "half-reset", "--ratio", "0.5", "--level", "category,layer,model")
    code, found, err = sweep(capsys, *words)
    assert (code, err) == (0, "")
    labels = [row["label"] for row in found["rows"]]
    assert set(labels[2:]) == {"half-reset 0.5", "half-reset 0.5 level layer", "half-reset 0.5 level model"}
    assert len({row["fingerprint"] for row in found["rows"][2:]}) == 3
    code, _, err = sweep(capsys, *words[:-1], "row")
    assert (code, err) == (1, "error: --level must be one of category, layer, model, not 'row'.\n")


def test_wanda_is_calibrated_once(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.calibrate import lockstep

    measured: list[None] = []
    real = lockstep.measure

    def count(*given: Any, **options: Any) -> Any:
        measured.append(None)
        return real(*given, **options)

    monkeypatch.setattr(lockstep, "measure", count)
    wanda = ("--method", "magnitude,wanda", "--sparsity", "0.5,0.75", "--calibration", "task.txt", "--samples", "2")
    code, found, err = sweep(capsys, *wanda, "--choose", "retention>=0", "--out", "out")
    assert (code, err, len(measured), len(found["choice"]["candidates"])) == (0, "", 1, 4)
    assert main([*found["choice"]["commands"][0][1:-1], "again"]) == 0
    assert files(root / "out") == files(root / "again")
    row = next(row for row in found["rows"] if row["label"] == "wanda 0.75")
    assert main([*row["command"][1:-1], "wanda"]) == 0
    report = json.loads((root / "wanda/surgery-report.json").read_text())
    assert report["totals"]["effective_sparsity"] == row["effective_sparsity"]
    assert report["totals"]["distance_after"] == row["distance"]


def test_nothing_meets_the_limit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, err = sweep(capsys, *HMA, "--choose", "forgetting<=-0.5", "--out", "out")
    assert (code, found["choice"]["winner"]) == (1, None)
    assert is_one_sentence(err)
    assert "No model could be proved to be one that forgets at most −50.00%" in err
    assert "hma 1 came nearest" in err
    assert not (root / "out").exists()


def test_ctrl_c_shows_and_writes_what_is_done(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sweep",
        "--pre",
        "pre",
        "--ft",
        "ft",
        *SCORES[:-1],
        "own",
        "--method",
        "magnitude",
        "--sparsity",
        "0:1:0.005",
    ]
    process = subprocess.Popen(
        [*SURGERY, *words, "--report", "report"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(list(Path("own").glob("*.json"))) < 9:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (130, "Stopped.\n")
    assert "It was stopped" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Wrote ")) <= 80
    found = json.loads((root / "report/results.json").read_text())
    done = [row["label"] for row in found["rows"]]
    assert found["stopped"]
    assert {"pre", "ft", "magnitude 0", "magnitude 1"} <= set(done)
    assert len(done) < 100
    assert all(len(row["scores"]) == 2 for row in found["rows"])
    # What was done is not done again.
    numbers_done = ",".join(label.split()[1] for label in done[2:])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Perplexity, "score", lambda *_: pytest.fail("scored again"))
        code, again, _ = sweep(capsys, "--cache", "own", "--method", "magnitude", "--sparsity", numbers_done)
    assert code == 0
    assert again["rows"] == found["rows"]


@pytest.mark.parametrize("method", ["fapm", "magnitude"])
def test_sparsity_auto(
    method: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.commands.search.TRIED", "0:1:0.25")
    words = [method, "--pre", "pre", "--ft", "ft", "--sparsity", "auto", *SCORES[:4], *SCORES[6:]]
    words.append("--max-forgetting=0.6")
    monkeypatch.setattr("sys.argv", ["surgery", *words])
    assert main(words) == 0
    report = json.loads((root / f"ft-{method}-auto/surgery-report.json").read_text())
    out = capsys.readouterr().out
    assert report["parameters"]["sparsity"] in (0.25, 0.5, 0.75, 1)
    *_, choice, command = report["notes"]
    assert choice.startswith(f"{method} {report['parameters']['sparsity']:g} keeps ")
    assert "That it forgets at most 60.00% is proved at 95%" in choice
    assert command.startswith(f"Without the search: surgery {method} --pre pre --ft ft --sparsity ")
    assert " ".join(choice.split()) in " ".join(out.split())
    assert max(len(line) for line in out.splitlines() if not line.startswith("Wrote")) <= 80
    # In a folder of its own, since the default output is beside the real ft.
    assert main([*command.split()[4:], "--out", "again"]) == 0
    assert files(root / "again") == files(root / f"ft-{method}-auto")


def test_hma_optimize(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.commands.search.SHIFTS", (-0.1, 0.0, 0.1))
    words = ["hma", "--pre", "pre", "--ft", "ft", "--optimize", "--mean", "0.2", *SCORES[:4], *SCORES[6:], "--json"]
    monkeypatch.setattr("sys.argv", ["surgery", *words])
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    ratios = report["parameters"]["ratios"]
    assert sum(ratios) == pytest.approx(0.6)
    *_, choice, command = report["notes"]
    assert "the best trade-off of all that was tried" in choice
    assert main([*command.split()[4:], "--out", "again"]) == 0
    assert files(root / "again") == files(root / "ft-hma-optimized")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "lora"), "--method takes fapm"),
        (("--sparsity", "0.5:0.9"), "--sparsity takes numbers"),
        (("--sparsity", "0.9:0.5:0.1"), "a range goes up"),
        (("--sparsity", "0:1:0.0001"), "more than 1,000"),
        (("--sparsity", "1.5"), "--sparsity must be between 0 and 1"),
        (("--drop-rate", "0.5"), "--drop-rate is for dare"),
        (("--sparsity", "0:1e999999999:1e-999999999"), "more than 1,000"),
        (("--method", "half-reset", "--seed", "0.5"), "--seed takes whole numbers"),
        (("--method", "half-reset", "--seed", "1e999"), "--seed takes whole numbers"),
        (("--method", "half-reset", "--seed", "9007199254740993"), "at most 15 digits"),
        (("--method", "wanda"), "--calibration"),
        (("--method", "hma", "--ratios", "0.1,0.2,0.3,0.4"), "only 3 layers"),
        (("--out", "x"), "--choose"),
        (("--choose", "loss<=1"), "--choose takes"),
        (("--choose", "forgetting<=0.1", "--out", "ft/x"), "inside the input"),
        (("--choose", "forgetting<=0.1", "--out", "cache"), "exists already"),
        (("--include", "nothing"), "matches no tensor"),
        (("--task", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_options_that_are_refused_before_any_work(
    words: tuple[str, ...], says: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Perplexity, "score", lambda *_: pytest.fail("scored"))
    code, _, err = sweep(capsys, *words)
    assert code == 1
    assert is_one_sentence(err), err
    assert says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fapm", "--sparsity", "auto"), "--sparsity auto needs --task, --general, --max-forgetting"),
        (("fapm", "--sparsity", "half"), "takes a number or auto"),
        (("fapm", "--sparsity", "auto", "--max-forgetting", "nan", *SCORES[:4]), "--max-forgetting must be a share"),
        (("fapm", "--max-forgetting", "0.1"), "--max-forgetting goes with --sparsity auto only"),
        (("magnitude", "--task", "task.txt"), "--task goes with --sparsity auto only"),
        (("hma", "--mean", "0.1"), "--mean goes with --optimize only"),
        (("hma", "--optimize"), "--optimize needs --task, --general"),
        (("hma", "--optimize", "--ratios", "0.1", *SCORES[:4]), "leave --ratios out"),
        (("hma", "--optimize", "--mean", "1.5", *SCORES[:4]), "--mean must be between 0 and 1"),
        (("extract", "--method", "fapm", "--sparsity", "auto", "--out", "x.safetensors"), "--sparsity"),
    ],
)
def test_searches_that_are_refused(
    words: tuple[str, ...], says: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], "--pre", "pre", "--ft", "ft", *words[1:]]) == 1
    err = capsys.readouterr().err
    assert is_one_sentence(err), err
    assert says in err


def test_scores_are_checked_before_the_calibration(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.calibrate import run

    monkeypatch.setattr(run, "calibrated", lambda *_, **__: pytest.fail("calibrated"))
    typed = ["wanda", "--pre", "pre", "--ft", "ft", "--sparsity", "auto", "--max-forgetting", "0.1"]
    assert main([*typed, "--calibration", "task.txt", "--task", "missing.jsonl", "--general", "general.txt"]) == 1
    assert "missing.jsonl" in capsys.readouterr().err


def test_the_chosen_checkpoint_is_written_though_nobody_reads_the_table(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.comparison import display as display_compare

    def away(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(display_compare, "_show", away)
    typed = ["sweep", "--pre", "pre", "--ft", "ft", *SCORES, "--method", "hma", "--ratios", "0.5"]
    assert main([*typed, "--choose", "forgetting<=1", "--out", "out", "--report", "report"]) == 1
    assert files(root / "out")
    assert (root / "report" / "results.json").exists()
    assert is_one_sentence(capsys.readouterr().err)


def test_numbers() -> None:
    assert numbers("0.5:0.95:0.05", "") == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert numbers("0.9,0.1:0.3:0.1,0.2", "") == (0.1, 0.2, 0.3, 0.9)
    assert numbers("0:1:0.3", "") == (0.0, 0.3, 0.6, 0.9)
    assert whole_numbers("0:4:2,7", "") == (0, 2, 4, 7)
    ratios = [method.ratios for method in settings(Hma, {"ratios": ["0.2,0.2,0.2", "0.1:0.3:0.1"]})]  # type: ignore[attr-defined]
    assert ratios == [(0.1,), (0.2,), (0.3,), (0.2, 0.2, 0.2)]
    for text in ("", "0.5;0.6", "1:2:0", "nan", "inf", "0:inf:1", "1e999:2e999:1"):
        with pytest.raises(OptionError):
            numbers(text, "sparsity")


def test_the_papers_triples() -> None:
    """MoFO paper, E.5: five of each mean."""
    assert {method.ratios for method in settings(Hma, {"ratios": ["paper"]})} == set(PAPER)  # type: ignore[attr-defined]
    assert len(set(PAPER)) == 15
    assert [round(sum(triple) / 3, 9) for triple in PAPER] == [0.2] * 5 + [0.5] * 5 + [0.8] * 5


def test_the_order_and_the_labels() -> None:
    groups: list[list[Method]] = [[Fapm(value) for value in (0.1, 0.2, 0.3, 0.4)], [Hma((0.5,)), Hma((0.3, 0.2, 0.1))]]
    assert [label(method) for method in interleaved(groups)] == [
        *("fapm 0.1", "hma 0.5", "fapm 0.4", "hma 0.3,0.2,0.1", "fapm 0.2", "fapm 0.3"),
    ]
    assert label(HalfReset(0.5, seed=1)) == "half-reset 0.5 seed 1"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Fapm(0.9), ["--sparsity", "0.9"]),
        (
            Dare(0.5, 1.0, 3, Scope("linear", "pre", ("a b", "c"))),
            [
                "--seed",
                "3",
                "--scope",
                "linear",
                "--rest",
                "pre",
                "--include",
                "a b",
                "--include",
                "c",
                "--drop-rate",
                "0.5",
            ],
        ),
        (HalfReset(0.25, "layer", 0, ("norm",)), ["--level", "layer", "--also", "norm", "--ratio", "0.25"]),
        (Hma((0.3, 0.2, 1.0)), ["--ratios", "0.3,0.2,1"]),
    ],
)
def test_command_lines(method: Any, words: list[str]) -> None:
    assert command_words(method, "p", "f") == ["surgery", method.name, "--pre", "p", "--ft", "f", *words]
