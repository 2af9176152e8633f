"""The plan of a training, known before the first weight is read: its rounds, their rows, and what is frozen in each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.data.draw import fewer
from surgery.data.rows import Data, Row, read
from surgery.errors import OptionError
from surgery.train.data import hold_out, replayed
from surgery.train.processes import find
from surgery.train.settings import ROUNDS, Settings

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
    """The data of one round, and its results.

    Attributes:
        rows: that are trained on; those that are replayed come to them.
    """

    data: Data
    rows: list[Row]
    held_out: list[Row]
    report: dict[str, Any] = field(default_factory=dict)


def plan(settings: Settings, observer: Observer = NOBODY) -> dict[str, Any]:
    """Read the data and the model's headers, and say what a training would do. Nothing is written.

    Returns:
        "rounds": of each its data, how many rows, of those replayed and of those held out, and what is frozen, as in a report.

    Raises:
        SurgeryError: anything that `surgery.train.run.train` would refuse beforehand.
    """
    check_libraries(settings)
    from surgery.train.exam import tests
    from surgery.train.model import blank_model, load_tokenizer, open_model

    processes, _ = find(fsdp=settings.fsdp)
    settings.parts(processes)
    checkpoint = open_model(settings.model)
    rounds = [read_round(settings, name, observer) for name in settings.data]
    older = [read_data(settings, name, observer) for name in settings.older]
    load_tokenizer(checkpoint.folder, chat=any(data.chat for data in (*older, *(round.data for round in rounds))))
    rows = [row for data in older for row in data.rows]
    tests(settings)
    model = blank_model(checkpoint)
    found = [
        {
            "data": round.data.name,
            "rows": len(round.rows),
            "replayed": len(replayed(remembered(settings, rounds, rows, number), settings.replay_ratio, settings.seed)),
            "held_out": len(round.held_out),
            "frozen": freeze(settings, model, settings.seed + number - 1),
        }
        for number, round in enumerate(rounds, 1)
    ]
    return {"method": "train", "settings": settings.as_json(), "rounds": found}


def read_round(settings: Settings, name: str, observer: Observer) -> Round:
    """Read the data of a round, and hold some of its rows out.

    Raises:
        OptionError, HubError: it cannot be read, or no row would be left to train on.
    """
    data = read_data(settings, name, observer)
    rows, held_out = hold_out(data.rows, settings.held_out, settings.seed)
    return Round(data, rows, held_out)


def read_data(settings: Settings, name: str, observer: Observer) -> Data:
    """Read a file or data set, a chat as one row: those that are not too long, and as many as are wanted."""
    fields = {"prompt": settings.prompt_field, "completion": settings.completion_field}
    data = read(name, task=settings.task, whole=True, **fields)
    data = fewer(data, max_chars=settings.max_chars, sample=settings.sample, seed=settings.seed)
    observer.say(data.sentence())
    return data


def remembered(settings: Settings, rounds: Sequence[Round], older: Sequence[Row], number: int) -> list[Row]:
    """The rows that may be replayed in a round.

    Args:
        older: the rows of older data.
        number: of the round, from 1. The first of several has nothing to remember, since nothing was learnt before it.
    """
    if settings.multi and number == 1:
        return []
    earlier = [row for round in rounds[: number - 1] for row in round.rows] if ROUNDS in settings.replay else []
    return [*older, *earlier]


def freeze(settings: Settings, model: torch.nn.Module, seed: int) -> dict[str, Any] | None:
    """Freeze what the settings say for a round, and describe it for the report; None where that is nothing.

    Raises:
        OptionError: a count or a range does not fit the model.
    """
    from surgery.optim import half_freeze, train_only

    if settings.cofitune:
        found = train_only(model, "feed_forward", *settings.cofitune)
    elif settings.frozen is not None or settings.freeze:
        found = half_freeze(
            model,
            ratio=settings.frozen or 0.0,
            level=settings.level,
            seed=seed,
            also=settings.freeze,
            counts=settings.frozen_counts,
        )
    else:
        return None
    named = {"ratio": found.ratio, "level": found.level, "seed": seed, "share": found.share}
    return {**named, "trainable": found.trainable, "tensors": list(found.names)}


def check_libraries(settings: Settings) -> None:
    """Refuse settings that need a library which is not installed."""
    wanted = ["transformers", "trl", "accelerate", "datasets"]
    wanted += [*(["peft"] if settings.adapted else []), *(["scipy"] if settings.gem == "gem" else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"surgery train needs {', '.join(missing)}: pip install 'model-surgery[train]'.")
    if settings.peft is not None:
        from surgery.train.adapter import check_adapter

        check_adapter(settings)
    if settings.log != "none" and importlib.util.find_spec(settings.log) is None:
        raise OptionError(f"`log` {settings.log} needs it installed: pip install {settings.log}.")
