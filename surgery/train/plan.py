"""What a training will do, known before the first weight is read: its rounds, their rows, and what is frozen in each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.data.rows import Data, Row, read
from surgery.errors import OptionError
from surgery.train.data import hold_out
from surgery.train.processes import find
from surgery.train.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Observer:
    """The functions that a run calls to show its progress.

    Attributes:
        say: a sentence.
        step: round (from 1) of how many, step of how many, and the step's loss, learning_rate and num_tokens.
    """

    say: Callable[[str], None] = lambda _: None
    step: Callable[[int, int, int, int, dict[str, float]], None] = lambda *_: None


NOBODY = Observer()


@dataclass
class Round:
    """The data of one round, and its results."""

    data: Data
    rows: list[Row]
    held_out: list[Row]
    report: dict[str, Any] = field(default_factory=dict)


def plan(settings: Settings, observer: Observer = NOBODY) -> dict[str, Any]:
    """Read the data and the model's headers, and say what a training would do. Nothing is written.

    Returns:
        "rounds": of each its data, rows, held-out rows, and what is frozen, as the report of a training has it.

    Raises:
        SurgeryError: anything that `surgery.train.run.train` would refuse beforehand.
    """
    check_libraries(settings)
    from surgery.train.model import blank_model, load_tokenizer, open_model

    processes, _ = find(fsdp=settings.fsdp)
    settings.parts(processes)
    checkpoint = open_model(settings.model)
    rounds = [read_round(settings, name, observer) for name in settings.data]
    load_tokenizer(checkpoint.folder, chat=any(round.data.chat for round in rounds))
    model = blank_model(checkpoint)
    found = [
        {
            "data": round.data.name,
            "rows": len(round.rows),
            "held_out": len(round.held_out),
            "frozen": freeze(settings, model, settings.seed + number),
        }
        for number, round in enumerate(rounds)
    ]
    return {"method": "train", "settings": settings.as_json(), "rounds": found}


def read_round(settings: Settings, name: str, observer: Observer) -> Round:
    """Read the data of a round, and hold some of its rows out.

    Raises:
        OptionError, HubError: it cannot be read, or no row would be left to train on.
    """
    data = read(name, task=settings.task, prompt=settings.prompt_field, completion=settings.completion_field)
    observer.say(data.sentence())
    rows, held_out = hold_out(data.rows, settings.held_out, settings.seed)
    return Round(data, rows, held_out)


def freeze(settings: Settings, model: torch.nn.Module, seed: int) -> dict[str, Any] | None:
    """Freeze what the settings say for a round, and describe it for the report; None where that is nothing."""
    if settings.frozen is None and not settings.freeze:
        return None
    from surgery.optim import half_freeze

    found = half_freeze(
        model,
        ratio=settings.frozen or 0.0,
        level=settings.level,
        seed=seed,
        also=settings.freeze,
        counts=settings.frozen_counts,
    )
    named = {"ratio": found.ratio, "level": found.level, "seed": seed, "share": found.share}
    return {**named, "trainable": found.trainable, "tensors": list(found.names)}


def check_libraries(settings: Settings) -> None:
    """Refuse settings that need a library which is not installed."""
    wanted = ["transformers", "trl", "accelerate", "datasets", *(["peft"] if settings.lora else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"surgery train needs {', '.join(missing)}: pip install 'model-surgery[train]'.")
    if settings.log != "none" and importlib.util.find_spec(settings.log) is None:
        raise OptionError(f"`log` {settings.log} needs it installed: pip install {settings.log}.")
