"""Speed and memory of each edit beside a plain copy and, where it is installed, mergekit, all in one run.

    python benchmarks/edit_speed.py --mergekit /path/to/mergekit-environment

makes a pair of TinyLlama-1.1B's shape (ft = pre + noise) and times, in turn, as often as `--repeat` says:

    cp                                       cp -r FT OUT
    fapm, magnitude, half-reset, hma         python -m surgery …, from start-up to exit
    ties, linear                             mergekit-yaml: TIES at density 0.1, and the mean of both

Every timing ends with a `sync` and so counts the bytes that are on disk. Before it the former output is removed, the
disk is synced and the inputs are read once, so that each run starts with a warm page cache and no pending writes. Peak
memory is what the kernel reports for the process itself (`ru_maxrss` of wait4: resident pages, mapped files included,
the largest process where there are several). It cannot fall below this script's own 20 MiB, which a child inherits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
SHARDS = 2
SEED = 0
CHUNK = 1 << 22  # entries generated at a time

NAMES = {"cp": "`cp -r`", "ties": "mergekit TIES", "linear": "mergekit linear"}  # of those that are not surgery's

TIES = """\
merge_method: ties
base_model: {pre}
models:
  - model: {ft}
    parameters: {{density: 0.1, weight: 1.0}}
dtype: bfloat16
"""
LINEAR = """\
merge_method: linear
models:
  - model: {pre}
    parameters: {{weight: 0.5}}
  - model: {ft}
    parameters: {{weight: 0.5}}
dtype: bfloat16
"""


@dataclass(frozen=True)
class Contestant:
    """A command to time; `out` is the folder it writes."""

    name: str
    command: list[str]
    out: Path


@dataclass(frozen=True)
class Run:
    """What one run took, the final sync included in `seconds` only."""

    seconds: float
    user_seconds: float
    system_seconds: float
    peak_mib: float
    minor_faults: int


def main() -> None:
    options = _options()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pair: Path = (options.pair or work / "pair").resolve()
    if not pair.exists():
        _say(f"generating {pair}")
        # In a process of its own: torch would raise this script's memory, which every child inherits as its least peak.
        subprocess.run([sys.executable, __file__, "--pair", pair, "--generate-only"], check=True)
    contestants = _contestants(pair, work / "out", options.mergekit, work)
    if options.only:
        unknown = set(options.only) - {contestant.name for contestant in contestants}
        if unknown:
            sys.exit(f"--only: no such contestant: {', '.join(sorted(unknown))} (ties and linear need --mergekit)")
        contestants = [contestant for contestant in contestants if contestant.name in options.only]
    machine = _machine(options.mergekit)
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    for turn in range(options.repeat):
        for contestant in contestants:
            run = _time(contestant, pair, work)
            runs[contestant.name].append(run)
            _say(f"{turn + 1}/{options.repeat} {contestant.name}: {run.seconds:.2f} s, {run.peak_mib:.0f} MiB")
    shutil.rmtree(work / "out")
    print("\n".join([f"- {key}: {value}" for key, value in machine.items()] + ["", *_table(runs)]))
    if options.json:
        measured = {name: [asdict(run) for run in of] for name, of in runs.items()}
        options.json.write_text(json.dumps({"machine": machine, "runs": measured}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, help="folder with pre/ and ft/; generated where missing [WORK/pair]")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "surgery-benchmark", metavar="DIR")
    parser.add_argument("--repeat", type=int, default=5, help="how often each is timed [5]")
    parser.add_argument(
        "--mergekit", type=Path, metavar="ENV", help="virtual environment with mergekit; off where missing"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B", help="names as in the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement here")
    parser.add_argument("--generate-only", action="store_true", help="make the pair and stop")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    if options.generate_only:
        generate(options.pair or options.work / "pair")
        sys.exit()
    return options


def _contestants(pair: Path, out: Path, mergekit: Path | None, work: Path) -> list[Contestant]:
    pre, ft = str(pair / "pre"), str(pair / "ft")
    edits = {
        "fapm": ["--sparsity", "0.9"],
        "magnitude": ["--sparsity", "0.9"],
        "half-reset": [],
        "hma": ["--ratios", "0.3,0.2,0.1"],
    }
    found = [Contestant("cp", ["cp", "-r", ft, str(out / "cp")], out / "cp")]
    for name, own in edits.items():
        command = [sys.executable, "-m", "surgery", name, "--pre", pre, "--ft", ft, "--out", str(out / name), "--force"]
        found.append(Contestant(name, command + own, out / name))
    if mergekit is not None:
        program = mergekit.resolve() / "bin" / "mergekit-yaml"
        if not program.exists():
            sys.exit(f"--mergekit: {program} does not exist; install mergekit into that environment")
        for name, recipe in {"ties": TIES, "linear": LINEAR}.items():
            config = work / f"{name}.yaml"
            config.write_text(recipe.format(pre=json.dumps(pre), ft=json.dumps(ft)))
            # The pair has no tokenizer to copy.
            command = [str(program), str(config), str(out / name), "--no-copy-tokenizer", "--quiet"]
            found.append(Contestant(name, command, out / name))
    return found


def _time(contestant: Contestant, pair: Path, work: Path) -> Run:
    """Run one contestant from a clean start, and stop the clock when its output is on disk."""
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()
    _read_all(pair)
    os.sync()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    log = work / f"{contestant.name}.log"
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(contestant.command, stdout=output, stderr=output, env=environment, cwd=work)
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not any(contestant.out.glob("*.safetensors")):
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{contestant.name} failed with exit code {process.returncode}: {contestant.command}\n{tail}")
    return Run(seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024, usage.ru_minflt)


def _read_all(pair: Path) -> None:
    buffer = bytearray(1 << 22)
    for path in [*(pair / "pre").iterdir(), *(pair / "ft").iterdir()]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _table(runs: dict[str, list[Run]]) -> Iterator[str]:
    """Yield a Markdown table of the medians."""
    medians = {name: statistics.median(run.seconds for run in of) for name, of in runs.items()}
    yield "| | median s | min–max s | times cp | TIES takes | linear takes | CPU s (in kernel) | peak MiB |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, of in runs.items():
        seconds = [run.seconds for run in of]
        to_cp = f"{medians[name] / medians['cp']:.2f} ×" if "cp" in medians else "–"
        peers = [
            f"{medians[peer] / medians[name]:.1f} × as long" if peer in medians and name not in NAMES else "–"
            for peer in ("ties", "linear")
        ]
        cpu = statistics.median(run.user_seconds + run.system_seconds for run in of)
        kernel = statistics.median(run.system_seconds for run in of)
        cells = [
            NAMES.get(name, f"`surgery {name}`"),
            f"{medians[name]:.2f}",
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            to_cp,
            *peers,
            f"{cpu:.1f} ({kernel:.1f})",
            f"{max(run.peak_mib for run in of):.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _machine(mergekit: Path | None) -> dict[str, str]:
    """Describe where the numbers come from."""
    cpu = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    memory = int((_field(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]) / 2**20
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {metadata.version(name)}" for name in ("torch", "numpy")),
    ]
    if mergekit is not None:
        names = ("mergekit", "torch", "transformers")
        ask = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {names}))"
        versions.append("beside " + _output([str(mergekit.resolve() / "bin" / "python"), "-c", ask]))
    version = _output([sys.executable, "-c", "import surgery; print(surgery.__version__)"])
    commit = _output(["git", "describe", "--always", "--dirty"])
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {cpu}, {memory:.0f} GiB, Linux {platform.release()}",
        "versions": ", ".join(versions),
        "surgery": f"{version} ({commit})" if commit else version,
        "date": time.strftime("%Y-%m-%d"),
    }


def _field(path: Path, name: str) -> str | None:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _output(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return TinyLlama-1.1B's tensors, in the order of the model."""
    kv = WIDTH // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "self_attn.q_proj.weight": (WIDTH, WIDTH),
            prefix + "self_attn.k_proj.weight": (kv, WIDTH),
            prefix + "self_attn.v_proj.weight": (kv, WIDTH),
            prefix + "self_attn.o_proj.weight": (WIDTH, WIDTH),
            prefix + "mlp.gate_proj.weight": (FEED_FORWARD, WIDTH),
            prefix + "mlp.up_proj.weight": (FEED_FORWARD, WIDTH),
            prefix + "mlp.down_proj.weight": (WIDTH, FEED_FORWARD),
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def generate(pair: Path) -> None:
    """Write a seeded pre/ and ft/ = pre + N(0, 1e-3) in bf16, a chunk at a time, complete or not at all."""
    making = pair.with_name(pair.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    for side in ("pre", "ft"):
        (making / side).mkdir(parents=True)
    draw = _normal(SEED)
    tensors = shapes()
    names = list(tensors)
    per_shard = math.ceil(len(names) / SHARDS)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        held = {name: tensors[name] for name in names[shard * per_shard : (shard + 1) * per_shard]}
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(held, file)
        with (making / "pre" / file).open("wb") as pre, (making / "ft" / file).open("wb") as ft:
            for output in (pre, ft):
                _write_header(output, held)
            for shape in held.values():
                _write_tensor(pre, ft, math.prod(shape), draw)
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    for side in ("pre", "ft"):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (making / side / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (making / side / "config.json").write_text(json.dumps(_config(), indent=2))
    making.rename(pair)


def _normal(seed: int) -> Callable[[int, float], Any]:
    """Return a function that draws `n` float32 values of a given deviation from one seeded stream."""
    import torch

    source = torch.Generator().manual_seed(seed)
    return lambda n, deviation: torch.empty(n).normal_(0.0, deviation, generator=source)


def _write_header(file: BinaryIO, tensors: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(pre: BinaryIO, ft: BinaryIO, entries: int, draw: Callable[[int, float], Any]) -> None:
    import torch

    for start in range(0, entries, CHUNK):
        size = min(CHUNK, entries - start)
        before = draw(size, 0.02).bfloat16()
        after = (before.float() + draw(size, 1e-3)).bfloat16()
        for file, values in ((pre, before), (ft, after)):
            file.write(values.view(torch.int16).numpy().tobytes())


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


if __name__ == "__main__":
    main()
