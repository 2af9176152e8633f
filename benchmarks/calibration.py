"""What `surgery wanda` costs on a real pair: time and peak memory, calibration and edit together, by the number of samples.

    python benchmarks/calibration.py --pre pre --ft ft --text c4.jsonl --samples 8,32,128

Each row is one run of the command in a process of its own. Peak memory is what the kernel reports for it (`ru_maxrss`); the
bound is what a dry run prints for the activations that are kept between two layers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("--pre", "--ft", "--text"):
        parser.add_argument(side, required=True, help="as for surgery wanda")
    parser.add_argument("--samples", default="8,32,128", help="how many, with commas between them [8,32,128]")
    parser.add_argument("--seq-len", default="2048", help="tokens in each [2048]")
    options = parser.parse_args()
    print("| samples asked for | used | seconds | peak MiB | bound of the activations |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for samples in options.samples.split(","):
        work = Path(tempfile.mkdtemp(prefix="surgery-calibration-"))
        try:
            print(measure(options, samples, work / "out"), flush=True)
        finally:
            shutil.rmtree(work)


def measure(options: argparse.Namespace, samples: str, out: Path) -> str:
    """One row of the table."""
    command = [sys.executable, "-m", "surgery", "wanda", "--pre", options.pre, "--ft", options.ft, "--out", str(out)]
    command += ["--calibration", options.text, "--samples", samples, "--seq-len", options.seq_len]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    plan = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True, check=True).stdout
    bound = re.search(r"at most ([0-9.]+ [a-zA-Z]+)", plan)
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--json"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    report = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}: {command}")
    used = re.search(r'"samples": ([0-9]+)', report)
    cells = [samples, used[1] if used else "–", f"{seconds:.1f}", f"{usage.ru_maxrss / 1024:.0f}"]
    return f"| {' | '.join([*cells, bound[1] if bound else '–'])} |"


if __name__ == "__main__":
    main()
