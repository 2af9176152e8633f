"""The commands that are disturbed: each writer of surgery, to a new place and over an earlier output."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from helpers.checkpoints import tiny_llama_pair
from helpers.command import call
from helpers.fault_server import ACTIONS
from helpers.faults import Case

PAIR = ("--pre", "pre", "--ft", "ft")
FAPM = ("fapm", *PAIR, "--out", "out", "--workers", "1")
EXTRACT = ("extract", *PAIR, "--method", "fapm", "--out", "delta.safetensors", "--workers", "1")
APPLY = ("apply", "--pre", "pre", "--delta", "delta.safetensors", "--out", "out", "--workers", "1")


def pair(root: Path) -> None:
    """A pair with a file in a folder beside its weights."""
    tiny_llama_pair(root)
    (root / "ft/templates").mkdir()
    (root / "ft/templates/one.jinja").write_text("{{ }}")


def after(*commands: tuple[str, ...]) -> Callable[[Path], None]:
    """A pair, and what the commands make of it."""

    def prepare(root: Path) -> None:
        pair(root)
        for words in commands:
            assert call(*words, cwd=root)[0] == 0

    return prepare


def half(words: tuple[str, ...]) -> tuple[str, ...]:
    """The same with another sparsity, for an earlier output that differs."""
    return (*words, "--sparsity", "0.5")


def trained(root: Path) -> None:
    pair(root)
    shutil.copyfile(root / "ft/model-00001-of-00002.safetensors", root / "ft/model.safetensors")


def scores_file() -> str:
    """The name of the file in which the case "scores" keeps them."""
    with tempfile.TemporaryDirectory() as folder:
        ACTIONS["scores"](["scores", folder])
        return f"cache/{next(Path(folder).iterdir()).name}"


def cases() -> list[Case]:
    """Every case."""
    apply_twice = after(half(EXTRACT), APPLY, (*EXTRACT, "--force"))
    return [
        Case("fapm", FAPM, "out", (*FAPM, "--resume"), pair),
        Case("fapm again", FAPM, "out", FAPM, pair),
        Case("fapm --force", (*FAPM, "--force"), "out", (*FAPM, "--force", "--resume"), after(half(FAPM))),
        Case("extract", EXTRACT, "delta.safetensors", EXTRACT, pair),
        Case(
            "extract --force", (*EXTRACT, "--force"), "delta.safetensors", (*EXTRACT, "--force"), after(half(EXTRACT))
        ),
        Case("apply", APPLY, "out", APPLY, after(EXTRACT)),
        Case("apply --force", (*APPLY, "--force"), "out", (*APPLY, "--force"), apply_twice),
        Case("train's writer", ("train-writer", "out"), "out", ("train-writer", "out", "--force"), trained),
        Case(
            "norms", ("norms", "norms.safetensors", "a"), "norms.safetensors", ("norms", "norms.safetensors", "a"), pair
        ),
        Case("scores", ("scores", "cache"), scores_file(), ("scores", "cache"), lambda root: (root / "cache").mkdir()),
    ]
