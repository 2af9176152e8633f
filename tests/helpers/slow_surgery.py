"""surgery as a program that pauses after each tensor, writes its journal often, and kills itself where a test wants it to.

SURGERY_KILL=LINES,SECONDS: when the journal has as many lines (the first says what the run is), and so many seconds have passed;
at the latest just before the output would appear.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from surgery.__main__ import main
from surgery.checkpoint import beside, delta, draft
from surgery.checkpoint.listing import JOURNAL

PAUSE = 0.0 if "SURGERY_KILL" in os.environ else 0.01
draft.SYNC_SECONDS = 0.01


def kill() -> None:
    """As the system would when memory is gone."""
    os.kill(os.getpid(), signal.SIGKILL)


def paused(finish: Any) -> Any:
    """A tensor is finished, and then nothing happens for a moment."""

    def finish_and_wait(*arguments: Any) -> None:
        finish(*arguments)
        time.sleep(PAUSE)

    return finish_and_wait


draft.Draft.finish = paused(draft.Draft.finish)  # type: ignore[method-assign]
delta.DeltaSink.close = paused(delta.DeltaSink.close)  # type: ignore[method-assign]
if asked := os.environ.get("SURGERY_KILL"):
    lines, seconds = asked.split(",")
    append = beside.Beside.append

    def append_and_kill(place: beside.Beside, content: bytes) -> None:
        """Enter lines, and start the clock when there are enough."""
        append(place, content)
        if len(Path(place.folder / JOURNAL).read_bytes().splitlines()) >= int(lines):
            threading.Timer(float(seconds), kill).start()

    beside.Beside.append = append_and_kill  # type: ignore[assignment, method-assign]
    entered = 0
    append_to = vars(draft)["append"]

    def append_to_part_and_kill(file: int, content: bytes) -> None:
        """The same of the journal of a part, whose first line is an entry; the last says that it is complete."""
        global entered
        append_to(file, content)
        entered += content.count(b"\n")
        if entered >= int(lines):
            threading.Timer(float(seconds), kill).start()

    vars(draft)["append"] = append_to_part_and_kill
    vars(draft)["appear"] = lambda *_, **__: kill()

sys.exit(main())
