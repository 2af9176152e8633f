"""Part 1: are the bytes and the choices on the GPU those of the processor, and of the literal reference?"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.reference.mofo import Mofo
from safetensors.torch import save_file

from benchmarks.gpu.record import Record
from surgery.checkpoint.tensor import Made
from surgery.editing.job import prepare
from surgery.engines.cpu import CpuEngine
from surgery.engines.cuda import CudaEngine
from surgery.methods import METHODS, DgHard, Intruder, Method
from surgery.optim import MoFO
from surgery.optim.mofo import FILTERS

DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)
SPECTRAL = (DgHard, Intruder)
Counts = tuple[int, int, int]  # entries, those that differ, and those that differ by more than rounding
# Of MoFO: with these, moments of gradients of few bits are exact in every arithmetic, and ties are real.
EXACT = (0.5, 0.75)


def run(record: Record) -> None:
    """Edits of every method and pair of types; after the first types, the choices of MoFO."""
    found: dict[str, dict[str, Counts]] = {name: {} for name in METHODS}
    for number, dtypes in enumerate(DTYPES[:3] if record.small else DTYPES):
        wide = (300, 1024) if record.small else (2048, 4099) if number < 2 else (1100, 1031)
        folder = record.work / str(number)
        pair, little = _pair(folder / "wide", *dtypes, wide), _pair(folder / "little", *dtypes, (700, 300))
        for name, kind in METHODS.items():
            spectral = kind in SPECTRAL
            found[name][str(dtypes)] = _edit(little if spectral else pair, kind(), dtypes[1], record.device)
            entries, other, far = (sum(counts) for counts in zip(*found[name].values(), strict=True))
            record.keep(name, found[name])
            if spectral:
                record.line(name, f"{far:,} of {entries:,} not within rounding", "0: other libraries' decompositions")
            else:
                record.line(name, f"{other:,} of {entries:,} differ", "0: byte for byte")
        for path in folder.rglob("*.safetensors"):
            path.unlink()
        if number == 0:
            _against_reference(record)
            _against_processor(record)


def _edit(pair: tuple[Path, Path], method: Method, dtype: torch.dtype, device: torch.device) -> Counts:
    """Edit a pair on both, whose ft is of a type."""
    entries = other = far = 0
    for step in prepare(*pair, method).steps:
        sides = []
        for engine in (CpuEngine(lambda _: None), CudaEngine(lambda _: None, device)):
            made = Made(step.ft.nbytes)
            engine.run(step, made)
            sides.append(torch.frombuffer(made.view, dtype=torch.uint8))
        one, two = (side.view(dtype) for side in sides)
        words = [side.view(len(one), -1) for side in sides]
        entries += len(one)
        other += int((words[0] != words[1]).any(dim=1).sum())
        close = torch.isclose(two.double(), one.double(), rtol=torch.finfo(dtype).eps, atol=1e-12)
        far += int((~close).sum())
    return entries, other, far


def _pair(folder: Path, pre_dtype: torch.dtype, ft_dtype: torch.dtype, wide: tuple[int, int]) -> tuple[Path, Path]:
    """A pair with ties, zeros and negative zeros in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (67, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.mlp.up_proj.weight": wide,
        "model.layers.0.mlp.down_proj.weight": (300, 1001),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.norm.weight": (16,),
    }
    pre = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ft = {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in pre.items()}
    pre["model.layers.0.mlp.up_proj.weight"][:3] = 0
    ft["model.layers.0.mlp.up_proj.weight"][1:9] = -pre["model.layers.0.mlp.up_proj.weight"][1:9]
    for side, tensors, dtype in (("pre", pre, pre_dtype), ("ft", ft, ft_dtype)):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / side / "model.safetensors")
    return folder / "pre", folder / "ft"


def _against_reference(record: Record) -> None:
    """MoFO on the device against the paper's algorithm, written out in float64."""
    rng, wrong, entries = np.random.default_rng(0), 0, 0
    for score, dtype in itertools.product(("momentum", "gradient"), (torch.float32, torch.bfloat16)):
        for n in (37, 3001) if record.small else (37, 3001, 40_001):
            start = torch.from_numpy(rng.normal(size=n)).to(dtype)
            reference = Mofo(start.double().numpy(), "0.15", 0.01, *EXACT, 1e-8, 0.0)
            parameter = torch.nn.Parameter(start.to(record.device, copy=True))
            optimizer = MoFO([parameter], lr=0.01, betas=EXACT, alpha=0.15, filter=score, rounding="master")
            for _ in range(3):
                gradient = rng.integers(-3, 4, n)
                before = _exact(optimizer, parameter)
                chosen = np.array(reference.step(gradient.astype(float), score))
                parameter.grad = torch.from_numpy(gradient).to(record.device, dtype)
                optimizer.step()
                after = _exact(optimizer, parameter)
                # Other entries keep their bits, and those that are chosen move by far more than what is rounded.
                wrong += int(((after != before) & ~chosen).sum())
                wrong += int((~np.isclose(after, reference.theta, rtol=2e-5, atol=1e-6)).sum())
                reference.theta[:] = after  # so that each step is held by itself
                entries += n
    record.line("MoFO and the literal reference", f"{wrong:,} of {entries:,} differ", "0")


def _exact(optimizer: MoFO, parameter: torch.nn.Parameter) -> np.ndarray[Any, np.dtype[np.float64]]:
    held = optimizer.state[parameter].get("master", parameter.detach())
    values: np.ndarray[Any, np.dtype[np.float64]] = held.double().cpu().numpy()
    return values


def _against_processor(record: Record) -> None:
    """MoFO on the device against MoFO on the processor: which entries move."""
    n, found = 70_000 if record.small else 5_000_000, {}
    for score, (dtype, rounding) in itertools.product(FILTERS, _kinds()):
        generator = torch.Generator().manual_seed(1)
        start, gradients = (
            torch.randn(n, generator=generator),
            [torch.randn(n, generator=generator) for _ in range(3)],
        )
        moved = []
        for device in (torch.device("cpu"), record.device):
            parameter = torch.nn.Parameter(start.to(device, dtype, copy=True))
            optimizer = MoFO([parameter], lr=0.1, alpha=0.15, filter=score, rounding=rounding)
            steps = []
            for gradient in gradients:
                before = _exact(optimizer, parameter)
                parameter.grad = gradient.to(device, dtype)
                optimizer.step()
                steps.append(_exact(optimizer, parameter) != before)
            moved.append(np.stack(steps))
        found[f"{score} {dtype} {rounding}"] = int((moved[0] != moved[1]).sum())
        record.keep("MoFO, entries that only one of the two moved", found)
    all_entries = 3 * n * len(found)
    record.line(
        "MoFO on both devices",
        f"{sum(found.values()):,} of {all_entries:,} differ",
        "moments may differ in the last bit: a handful",
    )


def _kinds() -> Iterator[tuple[torch.dtype, str]]:
    yield torch.float32, "nearest"
    yield torch.bfloat16, "stochastic"
    yield torch.bfloat16, "master"
