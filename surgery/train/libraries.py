"""Warnings of the libraries in a training: the known are left out or said in our words, and others are passed on, once."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

LIBRARIES = ("trl", "accelerate", "datasets", "peft", "torch", "huggingface_hub", "transformers")
LONGEST = 300  # characters of a message
# A message that is known -> what is said of it in its place; "" for nothing, since surgery says it itself or has made it so.
KNOWN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), said)
    for pattern, said in (
        # Said beforehand, of all rows: see `surgery.train.data.parted_prompts`.
        (r"tokenized prompt is not a prefix|Mismatch between tokenized prompt", ""),
        # The trainer takes the tokenizer's tokens over into the configuration, which is copied from the start model in the end.
        (r"tokenizer has new PAD/BOS/EOS tokens", ""),
        (r"padding-free|attention implementation is not set to", ""),
        (r"use_cache=True` is incompatible with gradient checkpointing", ""),
        # Of the adapter's name and the base's configuration, when peft writes an adapter.
        (r"Could not find a config file in|Unable to fetch remote file", ""),
        (r"loss_type=None` was set in the config", ""),
        # Saved states are numbered, and taken by their numbers.
        (r"mtime may not be reliable", ""),
        (r"No label_names provided for model class", ""),
    )
)


@contextlib.contextmanager
def heard(say: Callable[[str], None]) -> Iterator[None]:
    """A context in which the libraries' warnings go to `say`, and their progress bars and telemetry are off."""
    import datasets
    import transformers

    told = set[str]()

    def tell(library: str, message: str) -> None:
        known = next((said for pattern, said in KNOWN if pattern.search(message)), None)
        plain = " ".join(message.split())[:LONGEST]
        sentence = f"{library} warns: {plain}" if known is None else known
        if sentence and sentence not in told:
            told.add(sentence)
            say(f"Warning: {sentence}")

    own: Any = transformers.utils.logging  # untyped
    verbosity, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    other_bars = datasets.are_progress_bars_disabled()
    own.set_verbosity_warning()
    own.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with _loggers(tell), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Of what will change in a library (FutureWarning and its like) its users are no judges.
            for kind in (UserWarning, RuntimeWarning):
                warnings.simplefilter("default", kind)
            warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: tell(
                _library(filename), str(message)
            )
            yield
    finally:
        own.set_verbosity(verbosity)
        if bars:
            own.enable_progress_bar()
        if not other_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _loggers(tell: Callable[[str, str], None]) -> Iterator[None]:
    """A context in which the libraries' loggers tell us alone."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.name.partition(".")[0], record.getMessage())

    handler, kept = Handler(logging.WARNING), []
    for logger in map(logging.getLogger, LIBRARIES):
        kept.append((logger, logger.handlers, logger.level, logger.propagate))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, handlers, level, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def _library(filename: str) -> str:
    """The library that a file belongs to."""
    found = re.search(r"site-packages[/\\](\w+)", filename)
    return found[1] if found else "Python"
