"""The options of a task of lm-evaluation-harness: `gsm8k:metric=exact_match,filter=flexible-extract,shots=8`.

metric          one of the task's; pass@K of a task whose answers are programs that are run
filter          one of the task's ways to read an answer
shots           examples before each question
chat            yes: through the chat template, each example a turn
samples         answers that are drawn for each question
temperature     at which they are drawn; 0 for the likeliest one
top_p           they are drawn from the likeliest tokens that have this probability together
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from surgery.errors import OptionError

PASS = re.compile(r"pass@([1-9][0-9]{0,3})")
TEMPERATURE = 0.8  # of answers that are drawn, where none is given


@dataclass(frozen=True)
class HarnessOptions:
    """The options of a task; None for what the task says itself."""

    metric: str | None = None
    filter: str | None = None
    shots: int | None = None
    chat: bool = False
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None

    @classmethod
    def read(cls, spec: str, typed: str) -> HarnessOptions:
        """The options that a user typed.

        Raises:
            OptionError: one is unknown, given twice, or has a value that cannot be meant.
        """
        found: dict[str, Any] = {}
        for part in typed.split(","):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in KEYS:
                raise OptionError(f"{spec}: {key or part!r} is no option of a task. Choose from {', '.join(KEYS)}.")
            if key in found:
                raise OptionError(f"{spec}: {key} is given twice. Leave one out.")
            found[key] = _value(spec, key, value)
        options = cls(**found)
        drawn = PASS.fullmatch(options.metric or "")
        if drawn and int(drawn[1]) > (options.samples or 1):
            raise OptionError(f"{spec}: {options.metric} takes samples={drawn[1]} or more. Add it.")
        if options.samples is not None and options.samples > 1 and options.temperature == 0:
            raise OptionError(f"{spec}: at temperature 0 all samples are the same. Leave one of the two out.")
        return options

    @property
    def generation(self) -> dict[str, Any]:
        """The harness's own settings of how answers are drawn; {} for those of the task."""
        drawn = self.temperature
        if drawn is None and ((self.samples or 1) > 1 or self.top_p is not None):
            drawn = TEMPERATURE
        if drawn is None:
            return {}
        sampled = {"top_p": self.top_p} if self.top_p is not None else {}
        return {"do_sample": drawn > 0, "temperature": drawn, **sampled}

    def given(self) -> dict[str, Any]:
        """The options that are given, by their names."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


KEYS = tuple(field.name for field in fields(HarnessOptions))
# Of a whole number.
LEAST = {"shots": 0, "samples": 1}


def _value(spec: str, key: str, value: str) -> Any:
    if key in ("metric", "filter"):
        if not value:
            raise OptionError(f"{spec}: {key} is empty. Give one of the task's.")
        return value
    if key == "chat":
        if value not in ("yes", "no"):
            raise OptionError(f"{spec}: chat takes yes or no, not {value!r}.")
        return value == "yes"
    if key in LEAST:
        if not (value.isascii() and value.isdigit() and len(value) < 5 and int(value) >= LEAST[key]):
            raise OptionError(f"{spec}: {key} takes a whole number from {LEAST[key]}, not {value!r}.")
        return int(value)
    most = 1.0 if key == "top_p" else 100.0
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= most or (key == "top_p" and number == 0):
        raise OptionError(f"{spec}: {key} takes a number from 0 to {most:g}, not {value!r}.")
    return number
