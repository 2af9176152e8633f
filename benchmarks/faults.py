"""Everything that can go wrong while files are read and written, and what surgery makes of it: the table of docs/reliability.md.

    python benchmarks/faults.py                         everything: hours
    python benchmarks/faults.py --headers 500 --every 20 --kills 20

Three experiments. **Headers**: files of each format are damaged at random (bytes, numbers, lengths, nesting, truncation) and
opened, paired and read: each must be read or refused in a sentence, in seconds and in bounded memory. **Calls**: each command
that writes is run with a fault before each of its calls on files: EIO, ENOSPC, EMFILE, a kill, Ctrl-C, and where Python makes the
call MemoryError; see `Bench.judged` of tests/helpers/faults.py for what must hold of what is left. **Kills**: real processes,
killed after a random time, and given again with --resume.

Needs Linux and a C compiler, and what the tests need.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from helpers.checkpoints import fine_tuned, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.fault_cases import EXTRACT, FAPM, PAIR, cases
from helpers.faults import FAULTS, Bench, Case, Faults, Run

from surgery.checkpoint.delta import open_delta
from surgery.checkpoint.listing import stranger
from surgery.checkpoint.pair import pair
from surgery.checkpoint.source import open_both
from surgery.errors import SurgeryError

SECONDS, MEMORY, READ = 10, 6 << 30, 1 << 26


@dataclass
class Row:
    """A line of the table."""

    promised: str
    tested: str
    tries: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


# --- headers ---


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with one to four damages, most of them near its beginning or its end, where headers and directories are."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        span = min(len(data), draw.choice((16, 256, 4096)))
        at = draw.randrange(span) if draw.random() < 0.6 else len(data) - 1 - draw.randrange(span)
        kind = draw.randrange(8)
        if kind <= 2:
            data[at] = draw.randrange(256)
        elif kind == 3:
            del data[draw.randrange(len(data)) :]
        elif kind == 4:
            data[at : at + 8] = draw.choice((0, 1, (1 << 63) - 1, (1 << 64) - 1, len(data))).to_bytes(8, "little")
        elif kind == 5:
            data[at:at] = draw.choice(
                (b"9" * 30, b"1e999", b"NaN", b"null", b"-1", b'"', b"}", b"[" * 100_000, b"\xff")
            )
        elif kind == 6:
            other = draw.randrange(len(data))
            data[at : at + 32] = data[other : other + 32]
        else:
            del data[at : at + draw.randint(1, 64)]
        if not data:
            break
    return bytes(data)


def read(pre: Path, ft: Path) -> None:
    """Open a pair, and read each tensor of ft that is not enormous."""
    base, (tuned,) = open_both(str(pre), str(ft))
    pair(base, tuned)
    for tensor in tuned.tensors.values():
        if tensor.nbytes <= READ:
            with tensor.open() as reader:
                reader.fill(0, memoryview(bytearray(tensor.nbytes)))


@dataclass(frozen=True)
class Sample:
    """A file to damage, and what reads it."""

    name: str
    file: Path
    open: Callable[[], object]


def samples(root: Path) -> Iterator[Sample]:
    """A file of each kind that surgery reads."""
    pre, ft = tiny_llama_pair(root)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        yield Sample(name, ft / name, lambda: read(pre, ft))
    tensors = fine_tuned(tiny_llama())
    bin = root / "bin"
    bin.mkdir()
    torch.save(tensors, bin / "pytorch_model.bin")
    (bin / "config.json").write_bytes((ft / "config.json").read_bytes())
    yield Sample("pytorch_model.bin", bin / "pytorch_model.bin", lambda: read(pre, bin))
    adapter = root / "adapter"
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shape = tensors["model.layers.0.self_attn.q_proj.weight"].shape
    factors = {factor.format("A"): torch.ones(2, shape[1]), factor.format("B"): torch.ones(shape[0], 2)}
    write_checkpoint(adapter, factors)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "config.json").unlink(missing_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        yield Sample(name, adapter / name, lambda: read(pre, adapter))
    file = root / "model.gguf"
    write_gguf(file)
    yield Sample("model.gguf", file, lambda: read(pre, file))
    meta = root / "meta"
    meta.mkdir()
    torch.save(
        {"layers.0.attention.wq.weight": torch.ones(16, 16), "norm.weight": torch.ones(16)},
        meta / "consolidated.00.pth",
    )
    (meta / "params.json").write_text(json.dumps({"dim": 16, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5}))
    for name in ("params.json", "consolidated.00.pth"):
        yield Sample(name, meta / name, lambda: read(pre, meta))
    for words in (EXTRACT, FAPM):
        subprocess.run(
            [sys.executable, "-m", "surgery", *words], cwd=root, check=True, capture_output=True, env=environment()
        )
    delta = root / "delta.safetensors"
    yield Sample("task vector", delta, lambda: open_delta(delta))
    yield Sample("surgery-report.json", root / "out/surgery-report.json", lambda: stranger(root / "out"))


def write_gguf(path: Path) -> None:
    """A GGUF file with a few tensors of a Llama."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        writer.add_tensor(name, np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def limited() -> Iterator[None]:
    """Bounds on time and memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    old, before = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def headers(count: int, seed: int) -> Iterator[Row]:
    """Damage each kind of file, and read it."""
    with tempfile.TemporaryDirectory() as folder:
        for sample in samples(Path(folder)):
            row = Row("a damaged file is read or refused in a sentence, in bounded time and memory", f"`{sample.name}`")
            whole, draw, begun = sample.file.read_bytes(), random.Random(f"{seed} {sample.name}"), time.monotonic()
            for number in range(count):
                sample.file.write_bytes(damaged(whole, draw))
                row.tries += 1
                try:
                    with limited():
                        sample.open()
                except SurgeryError:
                    continue
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    row.wrong.append(f"{number}: {''.join(traceback.format_exception(error)[-2:])}")
            sample.file.write_bytes(whole)
            row.seconds = time.monotonic() - begun
            yield row


# --- calls ---


def calls(every: int) -> Iterator[Row]:
    """Every fault at every call of every writer."""
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder)) as faults:
        for number, case in enumerate(cases()):
            bench, begun = Bench(faults, case, Path(folder) / str(number)), time.monotonic()
            promised = (
                "inputs as before; the output absent, old or complete; exit 0 only if complete; the next run succeeds"
            )
            step = "each call" if every == 1 else f"each {every}th of the calls"
            row = Row(promised, f"{case.name}: {', '.join(FAULTS)} at {step} ({bench.calls:,})")
            for fault in FAULTS:
                for at in bench.points(fault, every):
                    row.tries += 1
                    if wrong := bench.faulty(fault, at):
                        row.wrong.append(wrong)
            row.seconds = time.monotonic() - begun
            yield row


# --- kills ---


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "SURGERY_KERNELS": "numpy", "HF_HUB_OFFLINE": "1"}


def big(root: Path) -> None:
    """A pair of 40 MB, which keeps one worker busy for a while."""
    pre = tiny_llama(layers=6, width=512)
    write_checkpoint(root / "pre", pre, shards=3)
    write_checkpoint(root / "ft", fine_tuned(pre), shards=3)


def kills(count: int, seed: int) -> Iterator[Row]:
    """Processes that are killed after a random time."""
    draw = random.Random(seed)
    words = ("fapm", *PAIR, "--out", "out", "--workers", "1")
    command = [sys.executable, "-m", "surgery", *words]
    case = Case("kills", words, "out", (*words, "--resume"), big)
    row = Row("a killed run is continued with --resume, to the same bytes", "`fapm` killed after a random time")
    with tempfile.TemporaryDirectory() as folder, Faults(Path(folder)) as faults:
        bench, begun = Bench(faults, case, Path(folder) / "kills"), time.monotonic()
        bench.reset()
        whole = time.monotonic()
        subprocess.run(command, cwd=bench.root, env=environment(), capture_output=True, check=True)
        whole = time.monotonic() - whole
        while row.tries < count:
            bench.reset()
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, cwd=bench.root, env=environment(), stdout=pipe, stderr=pipe, text=True)
            time.sleep(draw.uniform(0.2, 1) * whole)
            process.kill()
            out, err = process.communicate()
            if process.returncode == 0:
                continue
            row.tries += 1
            if wrong := bench.judged(Run(process.returncode, out, err, 0), "kill"):
                row.wrong.append(wrong)
        row.seconds = time.monotonic() - begun
        yield row


def main() -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=int, default=10_000, help="damaged files of each kind")
    parser.add_argument("--every", type=int, default=1, help="try each N-th call only")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| What is promised | How it is tested | Tries | Wrong | Seconds |")
    print("| --- | --- | ---: | ---: | ---: |")
    rows: list[Row] = []
    for row in (
        *((headers(asked.headers, asked.seed),) if asked.headers else ()),
        *((calls(asked.every),) if asked.every else ()),
        *((kills(asked.kills, asked.seed),) if asked.kills else ()),
    ):
        for one in row:
            rows.append(one)
            print(
                f"| {one.promised} | {one.tested} | {one.tries:,} | {len(one.wrong):,} | {one.seconds:.0f} |",
                flush=True,
            )
            for wrong in one.wrong[:5]:
                print(f"    {wrong}", file=sys.stderr, flush=True)
    print(f"\n{sum(row.tries for row in rows):,} tries, {sum(len(row.wrong) for row in rows):,} wrong.")
    sys.exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    main()
