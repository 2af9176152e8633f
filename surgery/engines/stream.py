"""The one streaming loop: pieces of work on threads, with progress, Ctrl-C and errors as they should be."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from surgery.errors import OptionError
from surgery.interrupt import postponed, uninterrupted

# More threads than this wait for the interpreter, not for the data.
MAX_WORKERS = 8

Work = TypeVar("Work")
Tick = Callable[[int], None]


class Stopped(Exception):
    """Raised in a worker when another one failed or the user pressed Ctrl-C."""


def workers(asked: int | None) -> int:
    """How many threads to use: what was asked for, or one for each core.

    Raises:
        OptionError: less than one was asked for.
    """
    if asked is not None and asked < 1:
        raise OptionError(f"`workers` must be 1 or more, not {asked}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or min(cores, MAX_WORKERS)


def stream(
    work: Iterable[Work],
    make_worker: Callable[[Tick], Callable[[Work], None]],
    count: int,
    advance: Callable[[int], None],
) -> None:
    """Do every piece of work, in its order, on `count` threads; give the largest first and they end together.

    Args:
        make_worker: called once in each thread with a function to call with the number of bytes just read, which may raise to
            stop the work; returns what does a piece.
        advance: called now and then, from this thread, with the number of bytes read since.

    Raises:
        BaseException: the first that a worker raised; the others have stopped by then.
    """
    waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
    for piece in work:
        waiting.put(piece)
    stop = threading.Event()
    failures: list[BaseException] = []
    read = [0] * count

    def worker(number: int) -> None:
        def tick(nbytes: int) -> None:
            read[number] += nbytes
            if stop.is_set():
                raise Stopped

        try:
            do = make_worker(tick)
            while True:
                do(waiting.get_nowait())
        except (queue.Empty, Stopped):
            return
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            ended[number].set()

    threads = [threading.Thread(target=worker, args=(number,), daemon=True) for number in range(count)]
    # Not Thread.join: Ctrl-C in one lets the next return although the thread goes on.
    ended = [threading.Event() for _ in range(count)]
    running: list[threading.Event] = []
    shown = 0
    try:
        with postponed():  # until it is known which threads there are to wait for
            for thread, end in zip(threads, ended, strict=True):
                thread.start()
                running.append(end)
        while not all(end.is_set() for end in running):
            for end in running:
                end.wait(0.1 / count)
            total = sum(read)
            advance(total - shown)
            shown = total
    finally:
        with uninterrupted():
            stop.set()
            for end in running:
                end.wait()
    if failures:
        raise failures[0]
    advance(sum(read) - shown)
