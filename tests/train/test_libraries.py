"""What the libraries say in a training reaches the user once, in our words where it is known."""

from __future__ import annotations

import logging
import warnings

import pytest

from surgery.train import libraries
from surgery.train.libraries import LIBRARIES, heard


def test_what_is_not_known_is_passed_on_once_and_everything_is_as_before() -> None:
    with heard(lambda _: None):  # the libraries put up their loggers when they are first loaded
        pass
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    said: list[str] = []
    with heard(said.append):
        for _ in range(2):
            logging.getLogger("trl.trainer.sft_trainer").warning("The moon is %s.", "full")
            warnings.warn("The sun is\nnot.", UserWarning, stacklevel=1)
        logging.getLogger("transformers.trainer").info("no more than news")
        warnings.warn("will be removed", FutureWarning, stacklevel=1)
    assert said == ["Warning: trl warns: The moon is full.", "Warning: Python warns: The sun is not."]
    assert [(one.handlers[:], one.level, one.propagate) for one in loggers] == before


def test_what_is_known_is_silent_or_said_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with heard(said.append):
        logging.getLogger("trl").warning(
            "The tokenized prompt is not a prefix of the tokenized prompt+completion, usually"
        )
    assert said == []
    pattern, _ = libraries.KNOWN[0]
    monkeypatch.setattr(libraries, "KNOWN", ((pattern, "Prompts end otherwise."),))
    with heard(said.append):
        logging.getLogger("trl").warning(
            "The tokenized prompt is not a prefix of the tokenized prompt+completion, usually"
        )
    assert said == ["Warning: Prompts end otherwise."]
