"""Part 2: the speed of edits on a pair of bf16 models, on the processor and on the GPU in turn, and what bounds it.

The pair has the shapes of Llama-3.2-3B, or fewer layers where the disk is too slow for three rounds. Times are of a process that
has started, with the inputs in the page cache, until a sync has put the output on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu.record import Record
from surgery.checkpoint.sink import Sink
from surgery.checkpoint.tensor import Reader
from surgery.editing.job import Job, prepare
from surgery.editing.run import engines
from surgery.editing.run import run as carry_out
from surgery.engines.stream import Tick, stream, workers
from surgery.methods import METHODS
from surgery.methods.actions import Step
from surgery.text import count as entries

LAYERS, WIDTH, FEED_FORWARD, KV, VOCABULARY = 28, 3072, 8192, 1024, 128256
ROUNDS = 3
RESERVE = 35  # seconds for what comes after the rounds
SHARD = 4 << 30  # bytes
# In the order of their worth, since a round may be cut short.
TIMED = ("fapm", "magnitude", "hma", "breadcrumbs", "half-reset")
ON_BOTH = ("fapm", "magnitude", "hma", "breadcrumbs")  # the others need no arithmetic
SPECTRAL = ("dg-hard", "intruder")


def run(record: Record) -> None:
    """Measure the disk, make a pair that it can take, and time."""
    disk = _disk(record)
    shapes = _shapes(record, disk)
    pair = record.work / "pair"
    seconds = record.timed(make_pair, pair, shapes, record.device)
    size = sum(path.stat().st_size for path in (pair / "ft").iterdir())
    record.keep("pair", {"layers": shapes[1], "bytes of a side": size, "seconds to make": seconds})
    _rounds(record, pair, size)
    _where(record, pair)
    _start_up(record)
    _alone(record, pair, size)
    _spectral(record)


def _disk(record: Record) -> float:
    """Bytes a second that reach the disk."""
    path, block = record.work / "disk", os.urandom(1 << 20)
    blocks = 8 if record.small else 1024

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block)
            os.fsync(file.fileno())

    rate = blocks * len(block) / record.timed(write)
    path.unlink()
    record.line("disk, written and synced", f"{rate / 1e9:.2f} GB/s")
    record.keep("disk, bytes a second", rate)
    return rate


def _shapes(record: Record, disk: float) -> tuple[dict[str, tuple[int, ...]], int]:
    """The tensors of as many layers as can be written in the time that there is, and how many these are."""
    if record.small:
        return _layers(2, 64, 192, 32, 512), 2
    written = 2 + ROUNDS * (1 + len(TIMED) + len(ON_BOTH))  # times the size of one side
    bytes_each = 0.6 * record.left * disk / written
    one = 2 * (2 * WIDTH * (WIDTH + KV) + 3 * WIDTH * FEED_FORWARD)
    layers = int((bytes_each - 2 * WIDTH * VOCABULARY) / one)
    layers = min(max(layers, 2), LAYERS)
    return _layers(layers, WIDTH, FEED_FORWARD, KV, VOCABULARY), layers


def _layers(layers: int, width: int, ffn: int, kv: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (kv, width),
            f"{prefix}self_attn.v_proj.weight": (kv, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}mlp.gate_proj.weight": (ffn, width),
            f"{prefix}mlp.up_proj.weight": (ffn, width),
            f"{prefix}mlp.down_proj.weight": (width, ffn),
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,)}


def make_pair(pair: Path, made: tuple[dict[str, tuple[int, ...]], int], device: torch.device) -> None:
    """Write pre, and ft = pre + N(0, 1e-3), in bf16; drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    for side in ("pre", "ft"):
        (pair / side).mkdir(parents=True)
        (pair / side / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in made[0].items():
        if held > SHARD:
            files, held = [*files, {}], 0
        files[-1][name] = shape
        held += 2 * torch.Size(shape).numel()
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        sides: dict[str, dict[str, torch.Tensor]] = {"pre": {}, "ft": {}}
        for name, shape in shapes.items():
            pre = torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
            sides["pre"][name] = pre.bfloat16().cpu()
            pre.copy_(sides["pre"][name])
            pre += torch.empty(shape, device=device).normal_(0, 1e-3, generator=generator)
            sides["ft"][name] = pre.bfloat16().cpu()
        for side, tensors in sides.items():
            save_file(tensors, pair / side / file, metadata={"format": "pt"})
    total = sum(2 * torch.Size(shape).numel() for shape in made[0].values())
    for side in ("pre", "ft"):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (pair / side / "model.safetensors.index.json").write_text(json.dumps(index))


def _job(pair: Path, method: str, out: Path | None = None) -> Job:
    return prepare(pair / "pre", pair / "ft", METHODS[method](), out=out)


class Nowhere:
    """A sink that lets go of what it is given."""

    def write(self, offset: int, data: Any) -> None:
        """Do nothing."""


def engine_alone(job: Job, device: torch.device, count: int | None = None) -> None:
    """Edit every tensor on so many workers and write nothing."""
    make = engines(device.type, False)

    def work(tick: Tick) -> Callable[[Step], None]:
        engine = make(tick)

        def one(step: Step) -> None:
            engine.run(step, Nowhere())

        return one

    stream(sorted(job.steps, key=lambda step: -step.ft.nbytes), work, workers(count), lambda _: None)


def _devices(record: Record) -> list[torch.device]:
    cpu = torch.device("cpu")
    return [cpu] if record.small else [cpu, record.device]


def _alone(record: Record, pair: Path, size: int) -> None:
    """The engines without the disk."""
    for method in ("fapm", "hma"):
        job, found = _job(pair, method, record.work / "none"), {}
        for device in _devices(record):
            if record.left < 12:
                return
            engine_alone(job, device)  # which starts the device and its allocator
            seconds = statistics.median(record.timed(engine_alone, job, device) for _ in range(ROUNDS))
            found[device.type] = seconds
        record.keep(f"{method}, engine alone", found)
        result = ", ".join(f"{device} {3 * size / seconds / 1e9:.1f} GB/s" for device, seconds in found.items())
        record.line(f"{method}, read and computed, nothing written", result, "of pre, ft and output; PCIe 55 each way")


def _where(record: Record, pair: Path) -> None:
    """Where one worker's time goes, fapm on the device."""
    job, spent = _job(pair, "fapm", record.work / "none"), defaultdict[str, float](float)
    steps = sorted(job.steps, key=lambda step: -step.ft.nbytes)[: 4 if record.small else 12]
    path = record.work / "written"
    fill = Reader.fill

    def timed_fill(reader: Reader, offset: int, view: memoryview) -> int:
        start = time.perf_counter()
        done = fill(reader, offset, view)
        spent["read"] += time.perf_counter() - start
        return done

    class TimedSink(Sink):
        def write(self, offset: int, data: Any) -> None:
            start = time.perf_counter()
            super().write(offset, data)
            spent["write"] += time.perf_counter() - start

    engine = engines(record.device.type, False)(lambda _: None)
    engine.run(steps[0], Nowhere())
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    Reader.fill = timed_fill  # type: ignore[method-assign, assignment]
    try:
        activities = [torch.profiler.ProfilerActivity.CPU if record.small else torch.profiler.ProfilerActivity.CUDA]

        def edit() -> None:
            for step in steps:
                engine.run(step, TimedSink(file, 0, threading.Lock()))

        with torch.profiler.profile(activities=activities) as profile:
            wall = record.timed(edit)
    finally:
        Reader.fill = fill  # type: ignore[method-assign]
        os.close(file)
        path.unlink()
    for event in profile.key_averages() if not record.small else ():
        kind = "kernels"
        if "memcpy" in event.key.lower():
            kind = "host to device" if "HtoD" in event.key else "device to host" if "DtoH" in event.key else kind
        spent[kind] += event.self_device_time_total / 1e6
    nbytes = sum(3 * step.ft.nbytes for step in steps)
    record.keep("fapm, one worker", {"wall": wall, "bytes": nbytes, **spent})
    parts = ", ".join(f"{name} {seconds / wall:.2f}" for name, seconds in spent.items())
    bound = max(spent, key=lambda name: spent[name])
    record.line("fapm, one worker, of each second", parts, f"bound by {bound}; {nbytes / wall / 1e9:.1f} GB/s")


def _rounds(record: Record, pair: Path, size: int) -> None:
    """Copies and edits in turn."""
    out = record.work / "out"

    def copy() -> None:
        subprocess.run(["cp", "-r", pair / "ft", out], check=True)

    calls: dict[str, Callable[[], object]] = {"cp": copy}
    for method in TIMED:
        for device in _devices(record) if method in ON_BOTH else [torch.device("cpu")]:
            job = _job(pair, method, out)
            calls[f"{method} {device.type}"] = partial(carry_out, job, device=device.type)
    times: dict[str, list[float]] = {name: [] for name in calls}
    longest = 0.0
    for _ in range(1 if record.small else ROUNDS):
        for name, call in calls.items():
            if record.left < 2 * longest + RESERVE:
                return
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            times[name].append(record.timed(_onto_disk, call))
            longest = max(longest, times[name][-1])
            record.keep("seconds", times)
            median, plain = statistics.median(times[name]), statistics.median(times["cp"])
            rate = f"{(2 if name == 'cp' else 3) * size / median / 1e9:.2f} GB/s"
            record.line(
                f"{name}, {entries(size // 2)}",
                f"{median:.2f} s, {rate}, {median / plain:.2f} × cp",
                f"median of {len(times[name])}",
            )
    shutil.rmtree(out, ignore_errors=True)


def _onto_disk(call: Callable[[], object]) -> None:
    call()
    os.sync()


def _start_up(record: Record) -> None:
    """What a command costs before it edits anything."""
    pair, found = record.work / "tiny", {}
    make_pair(pair, (_layers(1, 64, 64, 64, 64), 1), record.device)
    for device in _devices(record):
        words = ["fapm", "--pre", str(pair / "pre"), "--ft", str(pair / "ft"), "--device", device.type]

        def call(words: list[str] = words) -> None:
            shutil.rmtree(record.work / "started", ignore_errors=True)
            command = [sys.executable, "-m", "surgery", *words, "--out", str(record.work / "started")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        found[device.type] = statistics.median(record.timed(call) for _ in range(1 if record.small else ROUNDS))
    record.keep("seconds of a command on a tiny pair", found)
    record.line("a command on a tiny pair", ", ".join(f"{name} {value:.2f} s" for name, value in found.items()))


def _spectral(record: Record) -> None:
    """Methods that decompose matrices, on one layer."""
    pair = record.work / "layer"
    made = _layers(1, 64, 192, 32, 64) if record.small else _layers(1, WIDTH, FEED_FORWARD, KV, 1024)
    make_pair(pair, (made, 1), record.device)
    for method in SPECTRAL:
        job, found = _job(pair, method, record.work / "none"), dict[str, float]()
        for device in reversed(_devices(record)):
            if record.left > 10:
                found[device.type] = record.timed(engine_alone, job, device)
                record.keep(f"{method}, one layer", found)
                record.line(f"{method}, one layer", ", ".join(f"{name} {value:.2f} s" for name, value in found.items()))
