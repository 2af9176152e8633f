"""Run the parts of the GPU benchmark one after another, each in a process of its own, and print one table.

    bash benchmarks/gpu.sh OUT [--small]

A part that fails, or that takes more time than it is given, is recorded, and the next begins; the time that one part leaves goes
to those after it. The parts come in the order of their worth, so that a run that is cut short is worth something.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import tomllib

from benchmarks.gpu.record import Record

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8 * 60.0
# Seconds of each part. What is left of them is for start, end and the kernels.
PARTS = {"exact": 80, "tests": 50, "edits": 150, "mofo": 60, "hft": 45, "score": 65}
SMALL = 60.0  # of each part
LIBRARIES = ("torch", "transformers", "numpy", "peft", "triton", "trl", "datasets", "lm_eval", "greenlet")


def main() -> None:
    options = _options()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.part:
        work = Path(options.work)
        record = Record(out / f"{options.part}.json", work, options.small, time.monotonic() + options.seconds)
        importlib.import_module(f"benchmarks.gpu.{options.part}").run(record)
        return
    began = time.monotonic()
    found: dict[str, Any] = {"machine": _machine(), "kernels": build_kernels(), "parts": {}}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()), flush=True)
    given = 0.0
    for part in options.only or PARTS:
        given += SMALL if options.small else PARTS[part]
        found["parts"][part] = _part(part, out, began + min(given + 10, LIMIT - 10), options.small)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    found["seconds"] = round(time.monotonic() - began, 1)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(out, found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the JSON files")
    parser.add_argument("--small", action="store_true", help="every part small, on the processor")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _part(part: str, out: Path, end: float, small: bool) -> dict[str, Any]:
    """Run a part until `end` at most; say how it ended."""
    print(f"\n{part}", flush=True)
    start = time.monotonic()
    seconds = end - start
    if seconds < 5:
        return {"state": "no time was left", "seconds": 0.0}
    work = Path(tempfile.mkdtemp(prefix="surgery-gpu-"))
    command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--part", part, "--work", str(work)]
    if part == "tests":
        # Only the files that have such tests: others need libraries that may be missing.
        marked = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--import-mode=importlib",
            *map(str, marked),
        ]
        if importlib.util.find_spec("pytest") is None:
            return {"state": "pytest is not installed", "seconds": 0.0}
    else:
        command += ["--seconds", str(seconds), *(["--small"] if small else [])]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True
    )
    text, state = "", "done"
    try:
        text, _ = process.communicate(timeout=seconds)
        if process.returncode not in (0, 5 if part == "tests" else 0):  # 5: no test was to be run
            last = text.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            state = f"failed: {last[0][:200]}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        state = f"stopped after {seconds:.0f} s"
    finally:
        shutil.rmtree(work, ignore_errors=True)
    with (out / "log.txt").open("a") as log:
        log.write(f"== {part}: {state}\n{text}\n")
    print("\n".join(text.splitlines()[-30:]), flush=True)
    summary = text.strip().splitlines()[-1:] if part == "tests" else []
    return {"state": summary[0] if summary and state == "done" else state, "seconds": time.monotonic() - start}


def table(out: Path, found: dict[str, Any]) -> str:
    """Everything that the parts found, as text."""
    rows = []
    for part, ended in found["parts"].items():
        path = out / f"{part}.json"
        lines = json.loads(path.read_text())["lines"] if path.exists() and part != "tests" else []
        rows.append((part, f"{ended['seconds']:.0f} s", "" if ended["state"] == "done" else ended["state"]))
        rows += [(f"  {what}", result, against) for what, result, against in lines]
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    machine = found["machine"]
    head = [
        f"{machine['card']}, {machine['cores']} cores, {machine['versions']}, commit {machine['commit']}",
        f"kernels: {found['kernels']}; {found['seconds']:.0f} s in all",
    ]
    return "\n".join(["", *head, *(f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows)])


def build_kernels(source: Path = ROOT / "surgery" / "kernels.c") -> str:
    """Compile the kernels beside their source, as pyproject.toml says, unless that was done; say what came of it."""
    target = source.with_name("_kernels" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return "were there"
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return "numpy, since there is no C compiler"
    include = f"-I{sysconfig.get_paths()['include']}"
    command = [compiler, *extension["extra-compile-args"], "-shared", "-fPIC", include, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "compiled" if done.returncode == 0 else f"numpy, since they do not compile: {done.stderr.strip()[:200]}"


def _machine() -> dict[str, Any]:
    """Where the numbers come from."""
    about = "--query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max"
    card = _output(["nvidia-smi", about, "--format=csv,noheader"]).splitlines()
    versions = [f"{name} {_version(name)}" for name in LIBRARIES if importlib.util.find_spec(name)]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "card": card[0] if card else "no GPU",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{pages / 2**30:.0f} GiB",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "missing": ", ".join(name for name in LIBRARIES if not importlib.util.find_spec(name)),
        "commit": _output(["git", "describe", "--always", "--dirty"]) or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
