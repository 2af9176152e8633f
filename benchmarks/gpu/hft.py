"""Part 4: a training step with part of the model frozen, at the ratios of the HFT paper's Table 8, on a Llama of 1B."""

from __future__ import annotations

import statistics

import torch
import transformers

from benchmarks.gpu.record import Record
from benchmarks.optim_step import CASES, PAPER, Case, time_frozen
from surgery.text import count as number

ROUNDS = 3


def run(record: Record) -> None:
    """Time a step of every case in turn; the table shows the shares of a full step."""
    small = record.small
    config = transformers.LlamaConfig(
        vocab_size=256 if small else 32000,
        hidden_size=32 if small else 2048,
        intermediate_size=64 if small else 8192,
        num_hidden_layers=2 if small else 16,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(record.device):
        model = transformers.LlamaForCausalLM(config).bfloat16()
        ids = torch.randint(config.vocab_size, (1, 16) if small else (4, 1024))
    count = sum(p.numel() for p in model.parameters())
    # First what the others are a share of, and the half, which is the paper's own.
    cases = sorted(CASES, key=lambda case: (case != (0.0, ()), case != (0.5, ())))
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(1 if small else ROUNDS):
        for case, trained, seconds in time_frozen(model, ids, cases, record.timed):
            times[case].append(seconds)
            full, own = statistics.median(times[0.0, ()]), statistics.median(times[case])
            record.keep(f"{case[0]:.3f} {' '.join(case[1])}", {"trained": trained, "seconds": times[case]})
            paper = dict(zip(CASES, PAPER, strict=False)).get(case)
            name = f"frozen {case[0]:.1%}" + (" and the embedding" if case[1] else "")
            against = f"the paper {paper}%" if paper else ""
            if case == (0.0, ()):
                tokens = ids.numel() / own
                record.line(f"{name}, {number(count)}", f"{1e3 * own:.0f} ms, {tokens:,.0f} tokens/s", "a full step")
            else:
                record.line(name, f"{own / full:.1%} of a full step, {trained:.0%} trained", against)
            if record.left < 4 * own + 3:
                return
