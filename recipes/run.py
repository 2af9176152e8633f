"""Run a recipe: the commands of this tool that make a table or figure of one of the three papers.

    python recipes/run.py --list
    python recipes/run.py hft-table-7 --scale small      # a tiny model and a few rows of its own, in seconds
    python recipes/run.py hft-table-7 --scale paper      # the paper's models and data; for a GPU
    python recipes/run.py hft-table-7 --scale paper --dry-run

A recipe is a YAML file beside this one: where its numbers are from, what goes in at either scale, the commands, and the numbers
that the paper prints, which stand beside what came out. An output that is there is not made again, so that the same command goes
on after a stop. Numbers of the small scale mean nothing: it shows that the commands work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
# What a GPU of today does in bfloat16 at the 40% that training reaches, in operations a second.
RATE = 0.4 * 989e12
# A table is not squeezed below so many columns.
WIDTH = 132
WORDS = [f"w{number}" for number in range(80)]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe that the command line names; returns the exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description="Run the commands behind a table or figure of the papers.")
    names = sorted(path.stem for path in HERE.glob("*.yaml"))
    parser.add_argument("name", nargs="?", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--scale", choices=("paper", "small"), default="small")
    parser.add_argument("--out", type=Path, help="folder for everything; by default NAME-SCALE")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what they need")
    parser.add_argument("--list", action="store_true", help="print the recipes")
    asked = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    if asked.list or asked.name is None:
        for name in names:
            console.print(f"{name}: {read(name)['about']}", markup=False, highlight=False)
        return 0
    recipe = read(asked.name)
    folder = (asked.out or Path(f"{asked.name}-{asked.scale}")).absolute()
    for line in (recipe["about"], f"Source: {recipe['source']}", *recipe.get("notes", [])):
        console.print(line, markup=False, highlight=False)
    if asked.scale == "paper":
        for line in (*recipe.get("needs", []), *estimates(recipe)):
            console.print(f"- {line}", markup=False, highlight=False)
    if not asked.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        if asked.scale == "small":
            make_inputs(recipe, folder)
    for words in commands(recipe, asked.scale):
        console.print(f"$ {shlex.join(words)}", markup=False, highlight=False)
        if asked.dry_run or done(words, folder):
            continue
        from surgery.__main__ import main as surgery

        home = Path.cwd()
        os.chdir(folder)
        try:
            code = surgery(words[1:])
        finally:
            os.chdir(home)
        if code:
            return code
    if not asked.dry_run:
        console.print(beside(recipe, folder), width=max(console.width, WIDTH))
    return 0


def read(name: str) -> dict[str, Any]:
    """A recipe by its name."""
    recipe: dict[str, Any] = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return recipe


def commands(recipe: dict[str, Any], scale: str) -> list[list[str]]:
    """The words of each command, with what goes in at a scale."""
    inputs = {name: one["paper"] if scale == "paper" else small(name, one) for name, one in recipe["inputs"].items()}
    lines = re.sub(r"\\\n\s*", " ", recipe["commands"]).strip().splitlines()
    return [[word.format(**inputs) for word in shlex.split(line)] for line in lines if line.strip()]


def small(name: str, one: dict[str, Any]) -> str:
    """What stands for an input at the small scale: a folder or file of that name, and the metric that the paper's has."""
    ending = {"llama": "", "neox": "", "tuned": "", "text": ".txt"}.get(one["small"], ".jsonl")
    return f"inputs/{name}{ending}{':' + one['metric'] if 'metric' in one else ''}"


def done(words: list[str], folder: Path) -> bool:
    """Whether a command's output is there."""
    return "--out" in words and (folder / words[words.index("--out") + 1]).exists()


def estimates(recipe: dict[str, Any]) -> list[str]:
    """Memory and time at the paper's scale, calculated: 2 bytes a parameter to score in bfloat16; to train in float32 with Adam
    16 bytes, and 6 operations for each parameter and token.
    """
    parameters = float(recipe["parameters"])
    runs = sum(words[1] == "train" for words in commands(recipe, "paper"))
    found = [f"Scoring holds {2 * parameters / 1e9:.1f} GB of weights. Its time depends on the tasks."]
    if runs:
        hours = 6 * parameters * 1e6 / RATE / 3600
        found.append(
            f"Training holds {16 * parameters / 1e9:.0f} GB of weights, gradients and moments, and activations. Each of {runs} "
            f"runs takes about {hours:.2f} hours on one H100 for a million tokens that it reads."
        )
    return found


def make_inputs(recipe: dict[str, Any], folder: Path) -> None:
    """Write the inputs of the small scale into a folder: models from a config, rows that are drawn."""
    for name, one in recipe["inputs"].items():
        path = folder / small(name, one).partition(":")[0]
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            continue
        if one["small"] in ("llama", "neox", "tuned"):
            _model(path, one["small"])
            continue
        dice = random.Random(name)
        words = [dice.choices(WORDS, k=2) for _ in range(24)]
        if one["small"] == "text":
            path.write_text(" ".join(dice.choices(WORDS, k=60_000)))
            continue
        records: list[dict[str, Any]] = [
            {"question": " ".join(pair), "answer": dice.choice(WORDS)}
            if one["small"] == "rows"
            else {"query": " ".join(pair), "response": dice.choice(WORDS)}
            if one["small"] == "pairs"
            else {"question": " ".join(pair), "choices": pair, "answer": dice.randrange(2)}
            for pair in words
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _model(folder: Path, kind: str) -> None:
    """A model of two layers and its tokenizer; "tuned" is "llama" after a random change."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", "Question:", "Answer:", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    build: Any = PreTrainedTokenizerFast
    build(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    shape = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 384}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    make: Any = GPTNeoXForCausalLM if kind == "neox" else LlamaForCausalLM
    config: Any = GPTNeoXConfig if kind == "neox" else LlamaConfig
    model = make(config(**shape))
    if kind == "tuned":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def beside(recipe: dict[str, Any], folder: Path) -> Table:
    """What came out, and in brackets what the paper has."""
    document = json.loads((folder / recipe["results"]).read_bytes())
    measures = [(one["name"], recipe["scale"] if one["kind"] == "share" else 1) for one in document["measures"]]
    found = {row["label"]: row for row in document["rows"]}
    table = Table("", *recipe["columns"], title="here (in the paper)")
    rows = dict.fromkeys(found, [None] * len(measures)) | recipe["rows"]
    for label, numbers in rows.items():
        cells = []
        for number, (measure, scale) in zip(numbers, measures, strict=True):
            score = found[label]["scores"][measure]["value"] if label in found else None
            here = "–" if score is None else f"{score * scale:.{recipe['digits']}f}"
            cells.append(f"{here} ({'–' if number is None else number})")
        table.add_row(label, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
