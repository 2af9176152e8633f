"""How fast are log-likelihoods, beside lm-evaluation-harness's HF backend on the same texts, and are they the same numbers?

    python benchmarks/evaluation_speed.py --model pair/pre --data ../shared/data --questions 100 --answers 40

asks both for the choices of ARC-Easy and the answers of GSM8K, in turn, in the same type and batch size, and prints the medians
of the rounds and the largest difference. Needs lm-eval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from surgery.checkpoint.hub import resolve
from surgery.checkpoint.source import open_checkpoint
from surgery.model.language_model import LanguageModel, named_dtype
from surgery.model.likelihood import loglikelihoods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    choices = [json.loads(line) for line in (given.data / "arc_easy" / "test.jsonl").open()][: given.questions]
    rows = [json.loads(line) for line in (given.data / "gsm8k" / "test.jsonl").open()][: given.answers]
    texts = {
        "ARC-Easy, choices": [(row["question"], f" {choice}") for row in choices for choice in row["choices"]],
        "GSM8K, answers": [(row["question"], f" {row['answer']}") for row in rows],
    }
    dtype = named_dtype(given.dtype)
    checkpoint = open_checkpoint(resolve(str(given.model), companions=False))
    ours = LanguageModel(given.model, checkpoint, dtype=dtype, batch=given.batch)
    build: Any = HFLM
    theirs = build(pretrained=str(given.model), dtype=dtype, batch_size=given.batch, device="cpu")
    console = Console(width=100)
    for name, asked in texts.items():
        instances = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(asked)]
        pairs = [theirs._encode_pair(*text) for text in asked]
        tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
        seconds: dict[str, list[float]] = {"surgery": [], "lm-eval": []}
        for _ in range(given.rounds):
            begun = time.perf_counter()
            own = loglikelihoods(ours, pairs, lambda *_: None)
            seconds["surgery"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            other = theirs.loglikelihood(instances, disable_tqdm=True)
            seconds["lm-eval"].append(time.perf_counter() - begun)
        fast, slow = (statistics.median(found) for found in seconds.values())
        apart = max(abs(mine - his[0]) for mine, his in zip(own, other, strict=True))
        console.print(
            f"{name}: {tokens:,} tokens, surgery {tokens / fast:,.0f} a second, lm-eval {tokens / slow:,.0f}, "
            f"{slow / fast:.2f} times as fast; log-likelihoods differ by at most {apart:.1e}, {given.dtype}, "
            f"{torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main()
