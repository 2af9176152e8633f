"""Every command on a pair whose folders, tensors and data have names that command a terminal; and every command before `head`."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer.main
from helpers.command import SURGERY, call
from helpers.families import FAMILIES
from helpers.tiny_model import make_model, questions
from safetensors.torch import load_file, save_file

from surgery.commands import app
from surgery.demo.tokens import TOKEN_ID, tokenizer

# A formula, a title for the terminal (ESC), a colour in one character (C1), a turn of direction, another line, no character.
NAME = "=1+1\x1b]0;x\x07\x9b31m\u202eb\u2066\nINJECTED\U000e0041\x7f"
FT = f"ft{NAME}"
TENSOR = f"{NAME}.weight"
PAIR = ("--pre", "pre", "--ft", FT)
PLAIN = ("--pre", "plain-pre", "--ft", f"plain{NAME}")
TURNED = ("--pre", f"plain{NAME}", "--ft", "plain-pre")
SCORES = ("--task", f"{NAME}.txt", "--general", f"{NAME}.txt", "--limit", "2", "--seq-len", "32", "--device", "cpu")
SEARCH = ("--task", f"{NAME}.txt", "--general", f"{NAME}.txt", "--seq-len", "4", "--device", "cpu", "--method", "hma")
TRAIN = ("--model", f"lm{NAME}", "--data", f"{NAME}.jsonl", "--max-steps", "1", "--batch-size", "2")
# Of each command, the lines that are called, in this order; and the code, where it is not 0.
LINES: dict[str, list[tuple[str, ...]]] = {
    "diff": [
        PAIR,
        (*PAIR, "--tensor", TENSOR),
        (*PAIR, "--csv", f"d{NAME}.csv"),
        (*PAIR, "--plot", f"d{NAME}.svg"),
        (*PAIR, "--ranks"),
    ],
    "fapm": [(*PAIR, "--dry-run"), (*PAIR, "--out", f"fapm{NAME}")],
    "magnitude": [(*PAIR, "--sparsity", "0.5", "--out", f"magnitude{NAME}")],
    "relative": [(*PAIR, "--end", "high", "--out", f"relative{NAME}")],
    "half-reset": [(*PAIR, "--out", f"half{NAME}")],
    "hma": [(*PAIR, "--ratios", "0.3,0.1", "--out", f"hma{NAME}")],
    "breadcrumbs": [(*PAIR, "--out", f"breadcrumbs{NAME}")],
    "salience": [(*PAIR, "--out", f"salience{NAME}")],
    "lines": [(*PAIR, "--depth", "0.1,0.3", "--out", f"lines{NAME}")],
    "dg-hard": [(*PAIR, "--out", f"dg-hard{NAME}")],
    "intruder": [(*PAIR, "--out", f"intruder{NAME}")],
    "ties": [(*PAIR, "--ft", "ft2", "--out", f"ties{NAME}")],
    "dare": [(*PAIR, "--ft", "ft2", "--out", f"dare{NAME}")],
    "wanda": [(*PLAIN, "--calibration", f"{NAME}.txt", "--samples", "2", "--seq-len", "16", "--out", f"wanda{NAME}")],
    "extract": [(*PAIR, "--method", "fapm", "--out", f"delta{NAME}.safetensors")],
    "apply": [("--pre", "pre", "--delta", f"delta{NAME}.safetensors", "--out", f"applied{NAME}")],
    "verify": [(f"fapm{NAME}",), (f"fapm{NAME}", *PAIR)],
    "compare": [(*PLAIN, *SCORES, "--report", f"report{NAME}")],
    "auto": [(*TURNED, *SEARCH, "--dry-run"), (*TURNED, *SEARCH, "--out", f"auto{NAME}")],
    "sweep": [(*PLAIN, *SCORES, "--sparsity", "0.5", "--method", "fapm")],
    "demo": [("--out", FT)],
    "train": [(*TRAIN, "--out", f"trained{NAME}")],
}
REFUSED = ("demo",)
JSON = (
    "diff",
    "fapm",
    "magnitude",
    "relative",
    "half-reset",
    "hma",
    "breadcrumbs",
    "salience",
    "lines",
    "dg-hard",
    "intruder",
    "ties",
    "dare",
    "wanda",
    "apply",
    "compare",
    "auto",
    "sweep",
    "train",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    model = FAMILIES["llama"].build(seed=1)
    for side in ("plain-pre", f"plain{NAME}"):
        model.save_pretrained(root / side)
        tokenizer().save_pretrained(root / side)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    for plain, side in (("plain-pre", "pre"), (f"plain{NAME}", FT), (f"plain{NAME}", "ft2")):
        shutil.copytree(root / plain, root / side)
        tensors = load_file(root / side / "model.safetensors")
        scale = 1.0 if side == "pre" else 1.1
        save_file(tensors | {TENSOR: scale * torch.ones(4, 4)}, root / side / "model.safetensors", {"format": "pt"})
    words = list(TOKEN_ID)
    (root / f"{NAME}.txt").write_text(" ".join(words[place * place % len(words)] for place in range(200)))
    make_model(root / f"lm{NAME}")
    questions(root / f"{NAME}.jsonl")
    return root


def harmless(text: str) -> bool:
    return all(mark.isprintable() or mark == "\n" for mark in text) and "\nINJECTED" not in text


def test_every_command_is_here() -> None:
    command = typer.main.get_command(app)
    assert set(LINES) == set(command.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", LINES)
def test_nothing_that_others_wrote_commands_the_terminal(root: Path, command: str) -> None:
    if command in ("apply", "verify"):
        for made in ("fapm", "extract"):
            call(made, *LINES[made][-1], cwd=root)
    for words in LINES[command]:
        code, out, err = call(command, *words, cwd=root)
        assert code == (command in REFUSED), err
        assert harmless(out + err), out + err
        if command not in JSON:
            continue
        again = ("--force",) if "--out" in words else ()
        code, out, err = call(command, *words, *again, "--json", cwd=root)
        assert code == 0, err
        assert harmless(out + err)
        assert NAME in "".join(strings(json.loads(out))), "a program reads the very name"


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, held in value.items():
            yield key
            yield from strings(held)
    elif isinstance(value, list):
        for held in value:
            yield from strings(held)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("command", LINES)
def test_an_error_is_one_harmless_line(root: Path, command: str) -> None:
    first = {"verify": (f"none{NAME}",), "demo": ("--out", FT), "train": ("--model", f"none{NAME}")}
    words = first.get(command, ("--pre", f"none{NAME}", *LINES[command][0][2:]))
    code, out, err = call(command, *words, cwd=root)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert harmless(err)


def test_the_cells_of_a_csv_are_no_formulas(root: Path) -> None:
    report = root / f"report{NAME}"
    assert call("compare", *LINES["compare"][0], cwd=root)[0] == 0
    assert call("diff", *LINES["diff"][2], cwd=root)[0] == 0
    for path in (root / f"d{NAME}.csv", report / "results.csv", report / "items.csv"):
        text = path.read_text(encoding="utf-8")
        assert harmless(text)
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert any("=1+1" in cell for cell in cells)
        for cell in cells:
            assert cell[:1] not in tuple("=+@")
            assert cell[:1] != "-" or float(cell) < 0


def test_a_model_card_and_a_page_hold_no_command(root: Path) -> None:
    card = root / f"fapm{NAME}" / "README.md"
    call("fapm", *LINES["fapm"][-1], cwd=root)
    call("compare", *LINES["compare"][0], cwd=root)
    for path in (card, root / f"report{NAME}" / "index.html"):
        text = path.read_text(encoding="utf-8")
        assert "=1+1" in text
        assert all(mark.isprintable() or mark == "\n" for mark in text)


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), *((command, "--help") for command in LINES)], ids=" ".join
)
def test_help_ends_quietly_where_nobody_reads_it(root: Path, words: tuple[str, ...]) -> None:
    assert unread(root, *words) == (141, b"")


@pytest.mark.parametrize("command", [command for command in LINES if command != "demo"])
def test_a_command_ends_quietly_where_nobody_reads_it(root: Path, command: str) -> None:
    if command in ("apply", "verify"):
        for made in ("fapm", "extract"):
            call(made, *LINES[made][-1], cwd=root)
    words = LINES[command][0]
    if command in ("diff", "fapm"):
        assert unread(root, command, *words, "--json")[0] == 141
    code, said = unread(root, command, *words, *(("--force",) if "--out" in words else ()))
    assert code == 141
    assert b"Traceback" not in said
    assert b"Broken" not in said


def unread(root: Path, *words: str) -> tuple[int, bytes]:
    """The exit code and the complaints of a command whose output goes to a reader that is gone."""
    process = subprocess.Popen([*SURGERY, *words], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(timeout=60), said
