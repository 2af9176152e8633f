"""Programs that a model wrote, run one by one in processes of their own: without network, and unable to change a file.

Each has five seconds of processor time, 15 seconds in all, and 2 GiB of memory; `surgery.evaluation.sandboxed` sets that. It
can read the files that this process can, and has nowhere to send them to. The only way in is the program, the only way out
whether it came to its end.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.errors import OptionError

SECONDS = 15.0
CHILD = Path(__file__).with_name("sandboxed.py")
PROBE = """
import os, socket
def refused(act, *arguments):
    try:
        act(*arguments)
    except PermissionError:
        return True
assert refused(socket.socket) and refused(os.fork) and refused(open, "probe", "w") and refused(os.kill, os.getppid(), 0)
"""


def check() -> None:
    """See that a program is kept within its limits here.

    Raises:
        OptionError: it is not, on this system.
    """
    reached, said = _run(PROBE)
    if not reached:
        raise OptionError(
            "The code that a model writes cannot be kept from the network and from files here "
            f"({said or 'the filter of system calls does not hold'}): it takes Linux on x86-64 or ARM64, and a container that "
            "lets a process limit itself (seccomp). Leave out `confirm_run_unsafe_code` and the tasks that need it."
        )


def run(programs: Sequence[str]) -> list[bool]:
    """Run programs, as many at once as there are cores; whether each came to its end without an error."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [reached for reached, _ in pool.map(_run, programs)]


def _run(program: str) -> tuple[bool, str]:
    """Whether a program came to its end, and the last line that its process said of itself."""
    secret = secrets.token_hex(16).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", str(CHILD)],
            input=secret + b"\n" + program.encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=SECONDS,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, "no answer in time"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return done.stdout == secret, lines[-1] if lines else ""
