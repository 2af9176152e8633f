"""What `surgery auto` finds on a real pair, beside every method's default, on items that it did not see; and does self-KL
rank models as real measures do?

    python ../shared/tools/real_pair.py --out pair
    python benchmarks/results.py --pre pair/pre --ft pair/ft --data ../shared/data --out build/results

searches on 256 answers of GSM8K and on text that pre writes, and then scores what was found, the defaults of all methods that are
not slow, and other settings, on other answers, WikiText-2, BLiMP, ARC-Easy, PIQA and LAMBADA. It goes on from where it was
stopped. OUT has the search's page, the comparison's (fresh/), and rank.csv: Spearman's correlation between self-KL and how much
was forgotten of each measure, over all edits, with a 95% bootstrap interval over them.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import bootstrap, spearmanr

import surgery
from surgery.methods import METHODS

SEEN, FRESH = 256, 100
# File of the data folder, its items, and those before them that are left out.
GENERAL = {
    "wikitext2": ("wikitext2/valid.txt", 120, 0),
    "arc_easy": ("arc_easy/test.jsonl", 60, 0),
    "piqa": ("piqa/valid.jsonl", 60, 0),
    "lambada": ("lambada/test.jsonl", 60, 0),
}
PARADIGM = 12  # pairs of each of BLiMP's
# Beside the defaults.
OTHERS: Mapping[str, list[dict[str, Any]]] = {
    "fapm": [{"sparsity": 0.5}, {"sparsity": 0.75}, {"sparsity": 0.95}],
    "magnitude": [{"sparsity": 0.5}, {"sparsity": 0.75}, {"sparsity": 0.95}],
    "breadcrumbs": [{"sparsity": 0.75}],
    "half-reset": [{"ratio": 0.25}, {"ratio": 0.75}],
    "hma": [{"ratios": [0.3]}, {"ratios": [0.5]}, {"ratios": [0.7]}],
    "lines": [{"alpha": 0.3}, {"alpha": 0.6}],
    "dare": [{"drop_rate": 0.5}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--pre", "--ft", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args()
    out, pair = given.out, ["--pre", str(given.pre), "--ft", str(given.ft)]
    seen, fresh, general = write_items(given.data, out / "items")
    if not (out / "best").exists():
        run("auto", *pair, "--task", seen, "--min-retention", "1", "--cache", out / "cache", "--out", out / "best")
    if not (out / "wanda").exists():
        text = ["--calibration", given.data / "c4" / "c4_demo.jsonl", "--samples", "32", "--seq-len", "512"]
        run("wanda", *pair, *text, "--out", out / "wanda")
    both = surgery.open_pair(given.pre, given.ft)
    models: dict[str, Any] = {"auto": out / "best", "wanda": out / "wanda"}
    for name, method in METHODS.items():
        if not method.calibrated and not method.slow:
            models[name] = surgery.edit(both, name)
        for numbers in OTHERS.get(name, []):
            edit = surgery.edit(both, name, **numbers)
            models[edit.job.method.title()] = edit
    options: dict[str, Any] = {"task": fresh, "cache": out / "cache", "batch_size": 16}
    own = surgery.compare(both, models, general="self", **options)
    found = surgery.compare(both, models, general=general, **options)
    found.write(out / "fresh")
    console = Console(width=100)
    console.print(str(found))
    lines = rank_lines(found.rows, own.rows)
    with (out / "rank.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["measure", "edits", "spearman", "low", "high"], *lines])
    for line in lines:
        console.print(*line)


def write_items(data: Path, folder: Path) -> tuple[Path, Path, list[Path]]:
    """Files with the items that the search may see, the fresh ones of the task, and those of general ability."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = cut(data / "gsm8k" / "test.jsonl", folder / "gsm8k_seen.jsonl", SEEN, 0)
    fresh = cut(data / "gsm8k" / "test.jsonl", folder / "gsm8k.jsonl", FRESH, SEEN)
    general = [
        cut(data / name, folder / f"{short}{Path(name).suffix}", count, skipped)
        for short, (name, count, skipped) in GENERAL.items()
    ]
    blimp = folder / "blimp.jsonl"
    paradigms = [path.read_text().splitlines(keepends=True)[:PARADIGM] for path in sorted((data / "blimp").iterdir())]
    blimp.write_text("".join(line for lines in paradigms for line in lines))
    return seen, fresh, [*general, blimp]


def cut(source: Path, target: Path, count: int, skipped: int) -> Path:
    """Some lines of a file, as a file."""
    target.write_text("".join(source.read_text().splitlines(keepends=True)[skipped : skipped + count]))
    return target


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "surgery", *map(str, words)], check=True)


def rank_lines(real: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[list[Any]]:
    """For each measure: its name, how many edits there are, and Spearman's correlation of what they forgot with self-KL."""
    divergence = {row["label"]: row["scores"]["self"]["value"] for row in own[2:]}
    rows = [row for row in real[2:] if row["label"] in divergence]
    x = np.array([divergence[row["label"]] for row in rows])
    columns = {"mean": np.array([row["forgetting"] for row in rows])}
    for name in GENERAL | {"blimp": None}:
        rises = name in ("wikitext2", "lambada")  # a perplexity and a loss
        columns[name] = np.array([row["scores"][name]["value"] * (1 if rises else -1) for row in rows])
    lines = []
    for name, y in columns.items():
        interval = bootstrap((x, y), lambda a, b: spearmanr(a, b).statistic, paired=True, method="percentile", rng=0)
        low, high = interval.confidence_interval
        lines.append([name, len(rows), *(f"{value:.2f}" for value in (spearmanr(x, y).statistic, low, high))])
    return lines


if __name__ == "__main__":
    main()
