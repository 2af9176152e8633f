"""Programs that a model wrote reach no network and change no file, and an end is what counts."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from surgery.errors import OptionError
from surgery.evaluation import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")


def test_a_program_passes_where_it_comes_to_its_end() -> None:
    sandbox.check()
    programs = {
        "def add(a, b):\n    return a + b\nassert add(2, 3) == 5\nprint('a' * 100)": True,
        "open('/proc/self/status').read()\nfrom math import *\nassert comb(4, 2) == 6": True,
        "assert 1 == 2": False,
        "import sys; sys.exit(0)": False,
        "import os; os._exit(0)": False,
        "no Python": False,
        "def f(n):\n    return f(n) + 1\nf(1)": False,
        "x = bytearray(3 << 30)": False,
        "input()": False,
    }
    assert sandbox.run([*programs]) == [*programs.values()]


def test_a_program_reaches_no_network_starts_nothing_and_changes_no_file(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        acts = [
            f"import socket; socket.create_connection({address!r})",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{address[1]}')",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"open({str(kept)!r}, 'a').write('more')",
            f"import os; os.truncate({str(kept)!r}, 0)",
            f"import os; os.unlink({str(kept)!r})",
            f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
            f"import os; os.chmod({str(kept)!r}, 0)",
            f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
            "import os; os.fork()",
            "import subprocess; subprocess.run(['true'])",
            "import threading; threading.Thread(target=int).start()",
            f"import os; os.kill({os.getpid()}, 0)",
        ]
        # Each is refused by the system, rather than failing for another reason.
        tried = [f"try:\n    {act}\nexcept Exception as error:\n    found = error\n" for act in acts]
        assert sandbox.run([f"{program}assert found" for program in tried]) == [True] * len(acts)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "here"


def test_a_program_knows_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert sandbox.run(["import os; assert 'A_SECRET' not in os.environ"]) == [True]


def test_a_program_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    begun = time.monotonic()
    assert sandbox.run(["while True: pass", "import time; time.sleep(60)"]) == [False, False]
    assert time.monotonic() - begun < 10


def test_where_nothing_can_be_kept_within_limits_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PROBE", "raise OSError('no filter')")
    with pytest.raises(OptionError, match=r"no filter.*`confirm_run_unsafe_code`"):
        sandbox.check()
