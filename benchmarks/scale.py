"""What an edit of a large model needs, calculated on paper from rates that are measured on this machine.

    python -m benchmarks.scale

measures with one thread how fast an edit reads and computes where nothing is written, on one layer in bfloat16 and on one in fp8
with a scale for each block of 128 × 128 (as DeepSeek-V3 is stored); the peak memory of the command with eight threads; and how
fast this disk writes. Then it prints, for models of three sizes, what the disk has to read and write and how long that takes at a
rate, how long the arithmetic takes on some cores, and which of the two one waits for. Nothing of that table was run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.edits import engine_alone
from surgery.editing.job import prepare
from surgery.methods import METHODS

ROUNDS = 3
BLOCK = 128
METHOD = "fapm"
WORKERS = 8


@dataclass(frozen=True)
class Model:
    """A pair: how many entries a side has, and bytes of an entry of an input and of the output."""

    name: str
    entries: float
    stored: int
    written: int


MODELS = (
    Model("7B, bf16 (Llama-2-7B)", 6.74e9, 2, 2),
    Model("70B, bf16 (Llama-3.1-70B)", 70.6e9, 2, 2),
    Model("671B, fp8 in, bf16 out (DeepSeek-V3)", 671e9, 1, 2),
)
# Machines to rent: how many, the cores that work in each, and bytes a second that each one's share of the disk reads and writes.
MACHINES = ((1, 8, 1e9), (1, 8, 5e9), (4, 8, 5e9), (16, 8, 5e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of the layer that is measured [2048]")
    width: int = parser.parse_args().width
    work = Path(tempfile.mkdtemp(prefix="surgery-scale-"))
    try:
        disk = disk_rate(work)
        rates = {stored: rate(work / str(stored), stored, width) for stored in (2, 1)}
        peaks = {stored: peak(work / str(stored)) for stored in (2, 1)}
    finally:
        shutil.rmtree(work)
    print(
        f"Measured with one thread on {len(os.sched_getaffinity(0))} cores, {METHOD}, {width} wide, medians of {ROUNDS}:\n"
    )
    for stored, name in ((2, "bf16"), (1, "fp8")):
        million = f"{rates[stored] / 1e6:.0f} million entries a second"
        print(f"- {name} to bf16: {million}; {WORKERS} threads take {peaks[stored]:.0f} MiB")
    print(f"- this disk, written and synced: {disk / 1e9:.2f} GB/s\n")
    print("Calculated:\n")
    print("| pair | read | written | machines | disk of each | arithmetic | disk | one waits for |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for model in MODELS:
        for count, cores, each in MACHINES:
            print(line(model, rates[model.stored], count, cores, each))


def line(model: Model, rate: float, count: int, cores: int, disk: float) -> str:
    """A row of the table. Both sides are read once from the disk: what is read again is in the page cache by then."""
    read, written = 2 * model.entries * model.stored, model.entries * model.written
    arithmetic, waiting = model.entries / (rate * count * cores), (read + written) / (disk * count)
    bound = "the processor" if arithmetic > waiting else "the disk"
    cells = [
        model.name,
        f"{read / 1e9:,.0f} GB",
        f"{written / 1e9:,.0f} GB",
        f"{count} × {cores} cores",
        f"{disk / 1e9:.0f} GB/s",
        duration(arithmetic),
        duration(waiting),
        bound,
    ]
    return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """Seconds or minutes, with two digits."""
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def rate(folder: Path, stored: int, width: int) -> float:
    """Entries a second of an edit of one layer, on one thread, with nothing written."""
    shapes = {
        "self_attn.q_proj": (width, width),
        "mlp.up_proj": (11 * width // 4, width),
        "mlp.down_proj": (width, 11 * width // 4),
    }
    generator = torch.Generator().manual_seed(0)
    pre = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ft = {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in pre.items()}
    for side, tensors in (("pre", pre), ("ft", ft)):
        write(folder / side, tensors, stored)
    job = prepare(folder / "pre", folder / "ft", METHODS[METHOD](), out=folder / "out")
    cpu, seconds = torch.device("cpu"), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        engine_alone(job, cpu, 1)
        seconds.append(time.perf_counter() - start)
    return sum(value.numel() for value in pre.values()) / statistics.median(seconds)


def peak(folder: Path) -> float:
    """MiB that the whole command takes at most, on the pair in a folder."""
    words = [METHOD, "--pre", str(folder / "pre"), "--ft", str(folder / "ft"), "--workers", str(WORKERS)]
    code = (
        "import sys; from surgery.__main__ import main; main(sys.argv[1:]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, *words]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1024


def write(folder: Path, tensors: dict[str, torch.Tensor], stored: int) -> None:
    """A checkpoint of one layer, in bfloat16 or in fp8 with scales."""
    folder.mkdir(parents=True)
    config: dict[str, object] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    held = {}
    for name, value in tensors.items():
        name = f"model.layers.0.{name}.weight"
        if stored == 2:
            held[name] = value.bfloat16()
            continue
        blocks = value.view(value.shape[0] // BLOCK, BLOCK, value.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        held[name] = (blocks / scale[:, None, :, None]).reshape(value.shape).to(torch.float8_e4m3fn)
        held[f"{name}_scale_inv"] = scale
    if stored == 1:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def disk_rate(folder: Path) -> float:
    """Bytes a second that reach the disk."""
    path, block = folder / "disk", os.urandom(1 << 20)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(256):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return 256 * len(block) / seconds


if __name__ == "__main__":
    main()
