"""Part 3: time and peak memory of a step of MoFO, of its authors' algorithm and of torch's AdamW, at a Llama's shapes, 1B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.record import Record
from benchmarks.optim_step import AuthorsMoFO, medians
from surgery.optim import MoFO
from surgery.text import count as number

ROUNDS = 5


def run(record: Record) -> None:
    """Each optimizer in turn with fused AdamW on the same parameters."""
    shapes = _shapes(2, 32, 96, 16, 128) if record.small else _shapes(16, 2048, 8192, 512, 128256)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator(record.device).manual_seed(0)
        params = []
        for shape in shapes:
            parameter = nn.Parameter(torch.empty(shape, device=record.device, dtype=dtype).normal_(0, 0.02))
            parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3, generator=generator)
            params.append(parameter)
        _race(record, params, str(dtype).removeprefix("torch."))


def _race(record: Record, params: list[nn.Parameter], dtype: str) -> None:
    count = sum(p.numel() for p in params)
    base = torch.optim.AdamW(params, lr=1e-5, fused=True)
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {"MoFO": lambda: MoFO(params, lr=1e-5)}
    if dtype == "bfloat16":
        made["MoFO, stochastic"] = lambda: MoFO(params, lr=1e-5, rounding="stochastic")
        made["MoFO, master"] = lambda: MoFO(params, lr=1e-5, rounding="master")
    made |= {f"MoFO, {name}": _filtered(params, name) for name in ("gradient", "mv", "random")}
    made["foreach AdamW"] = lambda: torch.optim.AdamW(params, lr=1e-5, foreach=True)
    made["authors' MoFO"] = lambda: AuthorsMoFO(params, lr=1e-5, alpha=0.15)
    for name, make in made.items():
        if record.left < 5:
            return
        optimizer = make()
        optimizer.step()  # which allocates its state
        peak = _peak(record, optimizer)
        found = medians({"base": base.step, "own": optimizer.step}, ROUNDS, record.timed)
        own, plain = found["own"], found["base"]
        result: dict[str, Any] = {
            "seconds": own,
            "fused AdamW": plain,
            "peak bytes of a step": peak,
            "parameters": count,
        }
        record.keep(f"{name}, {dtype}", result)
        goal = "goal 1.3 ×, bar 1.5 ×" if name == "MoFO" and dtype == "float32" else ""
        memory = "" if peak is None else f", {peak / 2**30:.1f} GiB beside what it keeps"
        record.line(
            f"{name}, {dtype}, {number(count)}", f"{1e3 * own:.1f} ms, {own / plain:.2f} × fused AdamW{memory}", goal
        )
        del optimizer


def _filtered(params: list[nn.Parameter], name: str) -> Callable[[], torch.optim.Optimizer]:
    return lambda: MoFO(params, lr=1e-5, filter=name)


def _peak(record: Record, optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes that a step takes for a while."""
    if record.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _shapes(layers: int, width: int, ffn: int, kv: int, vocabulary: int) -> list[tuple[int, ...]]:
    layer: list[tuple[int, ...]] = [
        *((width, width), (kv, width), (kv, width), (width, width)),
        *((ffn, width), (ffn, width), (width, ffn), (width,), (width,)),
    ]
    return [(vocabulary, width), *layer * layers, (width,)]
