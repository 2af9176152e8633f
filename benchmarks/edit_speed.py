"""Speed and memory of each command beside a plain copy or a plain read and, where it is installed, mergekit, all in one run.

    python benchmarks/edit_speed.py --mergekit /path/to/mergekit-environment

makes a pair of TinyLlama-1.1B's shape (ft = pre + noise) and times, in turn, as often as `--repeat` says:

    cp                                       cp -r FT OUT
    cat                                      cat of the weights of both models
    fapm, magnitude, half-reset, hma         python -m surgery …, from start-up to exit
    ties, dare                               likewise
    fapm of a .bin                           likewise, pre in torch's format in two shards
    fapm of a .distcp                        likewise, pre as torch's distributed checkpoint
    diff, verify                             likewise; they write nothing
    extract, apply                           likewise; the task vector of fapm, and the checkpoint of it again
    mergekit ties, mergekit linear           mergekit-yaml: TIES at density 0.1, and the mean of both

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
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
SHARDS = 2
SEED = 0
CHUNK = 1 << 22  # entries generated at a time

# Of those that are not surgery's.
NAMES = {
    "cp": "`cp -r`",
    "cat": "`cat`",
    "mergekit ties": "mergekit TIES",
    "mergekit linear": "mergekit linear",
}
LABELS = {**NAMES, "fapm of a .bin": "`surgery fapm`, pre a .bin", "fapm of a .distcp": "`surgery fapm`, pre a .distcp"}
READERS = ("cat", "diff", "verify")  # compared with cat, the others with cp

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
    """A command to time; `out` is the folder or file that it writes, if it does."""

    name: str
    command: list[str]
    out: Path | None


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
    contestants = _contestants(pair, work, options.mergekit)
    if options.only:
        unknown = set(options.only) - {contestant.name for contestant in contestants}
        if unknown:
            sys.exit(f"--only: no such contestant: {', '.join(sorted(unknown))} (those of mergekit need --mergekit)")
        contestants = [contestant for contestant in contestants if contestant.name in options.only]
    machine = _machine(options.mergekit)
    _make(pair, work / "made", [contestant.name for contestant in contestants])
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    for turn in range(options.repeat):
        for contestant in contestants:
            run = _time(contestant, pair, work)
            runs[contestant.name].append(run)
            _say(f"{turn + 1}/{options.repeat} {contestant.name}: {run.seconds:.2f} s, {run.peak_mib:.0f} MiB")
    shutil.rmtree(work / "out")
    shutil.rmtree(work / "made", ignore_errors=True)
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
    parser.add_argument("--bin", type=Path, metavar="DIR", help="write pre in torch's format there and stop")
    parser.add_argument(
        "--distcp", type=Path, metavar="DIR", help="write pre as a distributed checkpoint there and stop"
    )
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    if options.generate_only:
        generate(options.pair or options.work / "pair")
        sys.exit()
    if options.bin:
        save_as_bin((options.pair or options.work / "pair") / "pre", options.bin)
        sys.exit()
    if options.distcp:
        save_distributed((options.pair or options.work / "pair") / "pre", options.distcp)
        sys.exit()
    return options


def _contestants(pair: Path, work: Path, mergekit: Path | None) -> list[Contestant]:
    out, made = work / "out", work / "made"
    pre, ft = str(pair / "pre"), str(pair / "ft")
    files = shlex.join(str(path) for side in ("pre", "ft") for path in sorted((pair / side).glob("*.safetensors")))
    found = [
        Contestant("cp", ["cp", "-r", ft, str(out / "cp")], out / "cp"),
        Contestant("cat", ["sh", "-c", f"cat {files} > /dev/null"], None),
    ]
    own = {
        "fapm": ["--sparsity", "0.9"],
        "magnitude": ["--sparsity", "0.9"],
        "half-reset": [],
        "hma": ["--ratios", "0.3,0.2,0.1"],
        "ties": ["--sparsity", "0.9"],
        "dare": ["--drop-rate", "0.9"],
    }
    surgery = [sys.executable, "-m", "surgery"]
    for name, options in own.items():
        command = [*surgery, name, "--pre", pre, "--ft", ft, "--out", str(out / name), *options]
        found.append(Contestant(name, command, out / name))
    for form in ("bin", "distcp"):
        command = [*surgery, "fapm", "--pre", str(made / form), "--ft", ft, "--out", str(out / form)]
        found.append(Contestant(f"fapm of a .{form}", command, out / form))
    found.append(Contestant("diff", [*surgery, "diff", "--pre", pre, "--ft", ft], None))
    delta = out / "task.safetensors"
    command = [*surgery, "extract", "--pre", pre, "--ft", ft, "--method", "fapm", "--out", str(delta)]
    found.append(Contestant("extract", command, delta))
    command = [*surgery, "apply", "--pre", pre, "--delta", str(made / "task.safetensors"), "--out", str(out / "apply")]
    found.append(Contestant("apply", command, out / "apply"))
    found.append(Contestant("verify", [*surgery, "verify", str(made / "fapm"), "--pre", pre, "--ft", ft], None))
    if mergekit is not None:
        program = mergekit.resolve() / "bin" / "mergekit-yaml"
        if not program.exists():
            sys.exit(f"--mergekit: {program} does not exist; install mergekit into that environment")
        for name, recipe in {"ties": TIES, "linear": LINEAR}.items():
            config = work / f"{name}.yaml"
            config.write_text(recipe.format(pre=json.dumps(pre), ft=json.dumps(ft)))
            # The pair has no tokenizer to copy.
            command = [str(program), str(config), str(out / name), "--no-copy-tokenizer", "--quiet"]
            found.append(Contestant(f"mergekit {name}", command, out / name))
    return found


def _make(pair: Path, made: Path, names: Collection[str]) -> None:
    """What some contestants start from: pre in torch's format, a task vector, an edited checkpoint."""
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    surgery = [sys.executable, "-m", "surgery"]
    inputs = ["--pre", str(pair / "pre"), "--ft", str(pair / "ft")]
    commands = {
        "fapm of a .bin": [sys.executable, __file__, "--pair", str(pair), "--bin", str(made / "bin")],
        "fapm of a .distcp": [sys.executable, __file__, "--pair", str(pair), "--distcp", str(made / "distcp")],
        "apply": [*surgery, "extract", *inputs, "--method", "fapm", "--out", str(made / "task.safetensors")],
        "verify": [*surgery, "fapm", *inputs, "--out", str(made / "fapm")],
    }
    for name, command in commands.items():
        if name in names:
            _say(f"preparing {name}")
            subprocess.run(command, check=True, env=_environment(), stdout=subprocess.DEVNULL)


def _time(contestant: Contestant, pair: Path, work: Path) -> Run:
    """Run one contestant from a clean start, and stop the clock when its output is on disk."""
    shutil.rmtree(work / "out", ignore_errors=True)
    (work / "out").mkdir()
    _read_all(pair, work / "made")
    os.sync()
    log = work / f"{contestant.name}.log"
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(contestant.command, stdout=output, stderr=output, env=_environment(), cwd=work)
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (contestant.out and not contestant.out.exists()):
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{contestant.name} failed with exit code {process.returncode}: {contestant.command}\n{tail}")
    return Run(seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024, usage.ru_minflt)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _read_all(*folders: Path) -> None:
    buffer = bytearray(1 << 22)
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def _table(runs: dict[str, list[Run]]) -> Iterator[str]:
    """Yield a Markdown table of the medians."""
    medians = {name: statistics.median(run.seconds for run in of) for name, of in runs.items()}
    yield "| | median s | min–max s | to copy or read | TIES takes | linear takes | CPU s (in kernel) | peak MiB |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, of in runs.items():
        seconds = [run.seconds for run in of]
        plain = "cat" if name in READERS else "cp"
        peers = [
            f"{medians[peer] / medians[name]:.1f} × as long"
            if peer in medians and name not in (*NAMES, *READERS)
            else "–"
            for peer in ("mergekit ties", "mergekit linear")
        ]
        cpu = statistics.median(run.user_seconds + run.system_seconds for run in of)
        kernel = statistics.median(run.system_seconds for run in of)
        cells = [
            LABELS.get(name, f"`surgery {name}`"),
            f"{medians[name]:.2f}",
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            f"{medians[name] / medians[plain]:.2f} × {plain}" if plain in medians else "–",
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


def save_as_bin(folder: Path, out: Path) -> None:
    """Save a checkpoint again as pytorch_model.bin, in as many shards."""
    import torch
    from safetensors.torch import load_file

    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        tensors = load_file(path)
        torch.save(tensors, out / file)
        weight_map |= dict.fromkeys(tensors, file)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text((folder / "config.json").read_text())


def save_distributed(folder: Path, out: Path) -> None:
    """Save a checkpoint again as torch's distributed checkpoint of one process."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict_saver

    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    state_dict_saver.save({"model": tensors}, checkpoint_id=out, no_dist=True)


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
