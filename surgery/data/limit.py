"""A limit on the time that somebody else's template or regular expression may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 20.0


class TooLong(Exception):
    """The time is up."""


@contextmanager
def within(seconds: float | None = None) -> Iterator[None]:
    """Stop what is inside when its time is up: an endless loop in a chat template, or a regular expression that explodes.

    An alarm does it, which only the main thread can have, on systems that know one; elsewhere there is no limit.

    Args:
        seconds: `SECONDS` where it is missing.

    Raises:
        TooLong: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS if seconds is None else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
