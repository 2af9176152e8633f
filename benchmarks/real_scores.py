"""What an edit did to a real model: perplexity on general text, answer loss on the fine-tuned task, and one generated answer.

    python benchmarks/real_scores.py --text valid.txt --questions test.jsonl pre ft ft-fapm-0.9

Each checkpoint is loaded with transformers as anybody would, which also shows that it loads.

    perplexity     exp of the mean loss per token over the first `--windows` windows of 512 tokens of --text
    answer loss    mean loss per token of the answers to the first `--items` rows of --questions (JSON lines with "question" and
                   "answer"), asked as "Question: …\nAnswer: "
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512


def perplexity(model: torch.nn.Module, tokens: torch.Tensor, windows: int) -> float:
    """exp(mean loss per token) over consecutive windows of `tokens`, int64 [n]."""
    losses = []
    for start in range(0, windows * WINDOW, WINDOW):
        ids = tokens[None, start : start + WINDOW]
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return math.exp(sum(losses) / len(losses))


def answer_loss(model: torch.nn.Module, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Mean loss per answer token, given (prompt ids, answer ids)."""
    total, count = 0.0, 0
    for prompt, answer in pairs:
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        count += len(answer)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoints[0])
    tokens = torch.tensor(tokenizer(args.text.read_text()[: args.windows * WINDOW * 8]).input_ids)
    rows = [json.loads(line) for line in args.questions.read_text().splitlines()[: args.items]]
    pairs = [
        (
            tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids,
            [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id],
        )
        for row in rows
    ]
    print("| checkpoint | perplexity | answer loss | first words of an answer |")
    print("| --- | ---: | ---: | --- |")
    for folder in args.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            prompt = torch.tensor([pairs[0][0]])
            output = model.generate(  # type: ignore[misc]
                prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
            words = " ".join(str(tokenizer.decode(output[0, prompt.shape[1] :])).split())
            general, task = perplexity(model, tokens, args.windows), answer_loss(model, pairs)
        print(f"| {folder.name} | {general:.2f} | {task:.3f} | {words} |", flush=True)


if __name__ == "__main__":
    main()
