"""What README and docs tell people to type works: every surgery command in them runs, every make target and file exists."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_llama_pair
from helpers.tiny_model import pair_of, questions, write

from surgery.__main__ import main

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its commands take hours, and data that is not here.
UNTRIED = ROOT / "docs" / "results.md"
EDITS = (
    "fapm",
    "magnitude",
    "relative",
    "breadcrumbs",
    "salience",
    "half-reset",
    "hma",
    "lines",
    "dg-hard",
    "intruder",
    "ties",
    "dare",
)


def commands() -> set[str]:
    """Whole commands: `surgery …` in backquotes or on an indented line, with or without a prompt."""
    text = re.sub(r"\\\n +", "", "\n".join(path.read_text() for path in TEXTS if path != UNTRIED))
    quoted = re.findall(r"`(surgery [a-z-]+[^`]*)`", text)
    indented = re.findall(r"^    (?:\$ )?(surgery [a-z-]+.*)$", text, re.MULTILINE)
    return {command.replace("\n", " ") for command in quoted + indented}


def test_there_are_commands() -> None:
    assert {words.split()[1] for words in commands()} >= set(EDITS)


def scores(command: str) -> bool:
    """Whether it runs the models."""
    return command.split()[1] in ("auto", "compare", "sweep") or "--task" in command


@pytest.mark.parametrize(
    "command", sorted(words for words in commands() if words.split()[1] in EDITS and not scores(words))
)
def test_edits_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny pair of our own in place of the models that the command names."""
    monkeypatch.chdir(tmp_path)
    tiny_llama_pair(tmp_path, layers=3)
    words = shlex.split(re.sub(r"--(pre|ft) \S+", "", command))[1:]
    assert main([*words, "--pre", "pre", "--ft", "ft", "--dry-run"]) == 0


@pytest.mark.parametrize("command", sorted(filter(scores, commands())))
def test_commands_that_score_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny pair, questions and texts under the names in the command; … stands for what an earlier one has."""
    monkeypatch.chdir(tmp_path)
    pair_of(tmp_path)
    assert main(["fapm", "--pre", "pre", "--ft", "ft"]) == 0
    (tmp_path / "ft").rename(tmp_path / "ckpt-mofo")
    shutil.copytree("ckpt-mofo", "ft")
    questions(tmp_path / "test.jsonl", 16)
    # Of 4,608 tokens: nine windows of 512, of which some choose and some prove.
    (tmp_path / "wikitext.txt").write_text(" ".join(f"w{n % 80}" for n in range(4608)))
    (tmp_path / "blimp").mkdir()
    write(tmp_path / "blimp" / "island.jsonl", [{"sentence_good": f"w{n} w1", "sentence_bad": "w2"} for n in range(4)])
    words = shlex.split(command.replace("…", "--pre pre --ft ft --task test.jsonl --general wikitext.txt"))[1:]
    shutil.copy("test.jsonl", "val.jsonl")
    # A random ft has learnt nothing, which a search refuses: tests/commands/test_auto.py has one that has.
    words += ["--dry-run"] if words[0] == "auto" or "--optimize" in words else []
    words = ["0.5,0.9" if word == "0.5:0.95:0.05" else word.replace("0.01", "1") for word in words]
    assert main(words) == 0


def test_the_commands_around_an_edit_run_in_the_order_of_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama_pair(tmp_path, layers=3)
    assert main(["fapm", "--pre", "pre", "--ft", "ft"]) == 0
    ran = set()
    for path in TEXTS:
        for words in re.findall(r"surgery (?:diff|extract|apply|verify) [^`\n]*", path.read_text()):
            command = shlex.split(words)[1:]
            if any("NAME" in word for word in command):
                continue
            assert main([*command, *(["--force"] if command[0] in ("extract", "apply") else [])]) == 0, words
            ran.add(command[0])
    assert ran == {"diff", "extract", "apply", "verify"}


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z]+)  ", (ROOT / "README.md").read_text())) == {"demo", "test"}
    assert {"demo", "test"} <= set(targets)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_linked_or_run_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for script in re.findall(r"python (benchmarks/\S+\.py)", text):
        assert (ROOT / script).exists(), script


def test_the_tree_in_the_readme_exists() -> None:
    for entry in re.findall(r"^    (surgery/\S+) ", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert list(ROOT.glob(entry.rstrip("/"))), entry
