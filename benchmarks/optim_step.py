"""Time of an optimizer's step, and of a training step with part of the model frozen, at the shapes of SmolLM2-135M.

    python benchmarks/optim_step.py

prints two Markdown tables. The first has the step alone, of all 134.5 million parameters in float32 with random gradients:

    fused AdamW, foreach AdamW      torch.optim.AdamW(fused=True), (foreach=True)
    MoFO                            surgery.optim.MoFO, α = 0.15; each of its filters
    authors' MoFO                   the algorithm of YChen-zzz/MoFO: torch.topk and a dozen passes over each tensor

The second has the ratios of HFT's Table 8: forward, backward and AdamW step of a Llama of these shapes, where `half_freeze` froze
tensors until about that share of the parameters is trained.

All that a table compares is timed in turn, round by round, in one process; the numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from surgery.optim import MoFO, half_freeze

LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 30, 576, 1536, 9, 3, 49152
# The share of frozen tensors for the paper's 8.3, 22.3, … 100% of trained parameters.
TRAINED = (0.083, 0.223, 0.306, 0.389, 0.5, 0.611, 0.694, 0.777, 0.917, 1.0)
PAPER = (48.0, 52.2, 56.4, 64.0, 68.5, 72.5, 85.1, 85.2, 89.0, 100.0)


class AuthorsMoFO(torch.optim.Optimizer):
    """The authors' algorithm: |m| ≥ the smallest of torch.topk of |m|, then masked passes over the whole tensor."""

    def __init__(self, params: Any, lr: float, alpha: float) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m"].lerp_(p.grad, 1 - 0.9)
                state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
                root = (1 - 0.999 ** state["t"]) ** 0.5
                scale = (state["v"].sqrt() / root).add_(1e-8)
                size = state["m"].abs()
                threshold = torch.topk(size.view(-1), max(1, int(p.numel() * group["alpha"])))[0].min()
                chosen = torch.where(size >= threshold, state["m"], 0)
                p.addcdiv_(chosen, scale, value=-group["lr"] / (1 - 0.9 ** state["t"]))


def shapes() -> list[tuple[int, ...]]:
    """Of SmolLM2-135M's tensors; embedding and head are one."""
    kv = WIDTH // HEADS * KV_HEADS
    layer: list[tuple[int, ...]] = [
        *((WIDTH, WIDTH), (kv, WIDTH), (kv, WIDTH), (WIDTH, WIDTH)),
        *((FEED_FORWARD, WIDTH), (FEED_FORWARD, WIDTH), (WIDTH, FEED_FORWARD), (WIDTH,), (WIDTH,)),
    ]
    return [(VOCABULARY, WIDTH), *layer * LAYERS, (WIDTH,)]


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call that is done when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[Callable[[], object]], float] = timed
) -> dict[str, float]:
    """Seconds of each call; the first round, which allocates, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(clock(call))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def steps(rounds: int) -> None:
    """Print the table of optimizers."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes()]
    generator = torch.Generator().manual_seed(1)

    def stepping(make: Callable[[], torch.optim.Optimizer]) -> Callable[[], object]:
        optimizer = make()
        return lambda: optimizer.step()

    made = {
        "fused AdamW": lambda: torch.optim.AdamW(params, lr=1e-5, fused=True),
        "foreach AdamW": lambda: torch.optim.AdamW(params, lr=1e-5, foreach=True),
        "MoFO": lambda: MoFO(params, lr=1e-5),
        'MoFO, filter="gradient"': lambda: MoFO(params, lr=1e-5, filter="gradient"),
        'MoFO, filter="mv"': lambda: MoFO(params, lr=1e-5, filter="mv"),
        'MoFO, filter="random"': lambda: MoFO(params, lr=1e-5, filter="random"),
        "authors' MoFO": lambda: AuthorsMoFO(params, lr=1e-5, alpha=0.15),
    }
    # Two at a time, so that one optimizer's state is in memory besides fused AdamW's.
    first = stepping(made.pop("fused AdamW"))
    rows = []
    for name, make in made.items():
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        found = medians({"fused AdamW": first, name: stepping(make)}, rounds)
        rows.append((name, found[name], found["fused AdamW"]))
    count = sum(p.numel() for p in params)
    print(
        f"\n{count / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| optimizer | step, s | fused AdamW beside it, s | ratio |\n| --- | ---: | ---: | ---: |")
    for name, seconds, base in rows:
        print(f"| {name} | {seconds:.3f} | {base:.3f} | {seconds / base:.1f} |")


# The share of tensors that is frozen, and what else is.
Case = tuple[float, tuple[str, ...]]
CASES: list[Case] = [(round(1 - trained, 3), ()) for trained in TRAINED] + [(0.5, ("embedding", "head"))]


def time_frozen(
    model: nn.Module, ids: torch.Tensor, cases: list[Case], clock: Callable[[Callable[[], object]], float] = timed
) -> Iterator[tuple[Case, float, float]]:
    """For each case the share of parameters that is trained, and seconds of a step: forward, backward and AdamW."""
    for case in cases:
        choice = half_freeze(model, case[0], also=case[1])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def once(optimizer: torch.optim.AdamW = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        once()  # which allocates
        yield case, 1 - choice.share, clock(once)


def frozen(rounds: int, layers: int, batch: int, length: int) -> None:
    """Print the table of half fine-tuning."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(VOCABULARY, (batch, length))
    times: dict[Case, list[float]] = {case: [] for case in CASES}
    shares: dict[Case, float] = {}
    for _ in range(rounds):
        for case, shares[case], seconds in time_frozen(model, ids, CASES):
            times[case].append(seconds)
    full = statistics.median(times[0.0, ()])
    print(f"\n{layers} layers, batch {batch} × {length} tokens; a full step takes {full:.2f} s\n")
    print(
        "| frozen tensors | trained parameters | time of a full step | paper's Table 8 |\n| ---: | ---: | ---: | ---: |"
    )
    for case, paper in zip(CASES, [f"{number}%" for number in PAPER] + [""], strict=True):
        name = f"{case[0]:.1%}" + (" and the embedding" if case[1] else "")
        print(f"| {name} | {shares[case]:.1%} | {statistics.median(times[case]) / full:.1%} | {paper} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="layers of the model that is trained in the second table"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--only", choices=["steps", "frozen"], help="one table alone")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if options.only != "frozen":
        steps(options.rounds)
    if options.only != "steps":
        frozen(options.rounds, options.layers, options.batch, options.length)


if __name__ == "__main__":
    main()
