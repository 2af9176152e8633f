"""The settings of a paper's training, under its name: `surgery train --preset`.

What is not here is as it is by default, which is what MoFO's authors use. Options that are typed or in a --config file win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import OptionError


@dataclass(frozen=True)
class Preset:
    """A paper's settings: names of `Settings` -> values.

    Attributes:
        source: where they are from.
        tuning: of one data set.
        preferences: of --task dpo.
        rounds: of several data sets, one after the other.
    """

    source: str
    tuning: Mapping[str, Any]
    preferences: Mapping[str, Any] = field(default_factory=dict)
    rounds: Mapping[str, Any] = field(default_factory=dict)


# Epochs of its tasks, from C-STANCE to 20Minuten.
TRACE = (5, 3, 7, 5, 3, 5, 5, 7)

PRESETS = {
    # The paper says no more than this: no schedule, no warm-up, no length.
    "fapm": Preset("FAPM §4", {"optim": "adamw", "lr": 5e-6, "batch_size": 2, "epochs": 3.0}),
    # The text says 0.3 for the warm-up, the code that it follows (open-instruct) 0.03. TRACE has a fixed rate.
    "hft": Preset(
        "HFT A.2.3",
        {"optim": "hft", "lr": 2e-5, "schedule": "linear", "warmup": 0.03, "batch_size": 128} | {"seq_len": 4096},
        {"optim": "hft", "lr": 5e-7, "batch_size": 32, "seq_len": 4096},
        {"optim": "hft", "lr": 1e-5, "schedule": "constant", "warmup": 0.0, "batch_size": 128},
    ),
    # The rate is left to the default, which is higher for LoRA, as in the paper; so are two epochs, as in the HFT paper.
    "mofo": Preset(
        "MoFO D.3",
        {"optim": "mofo", "alpha": 0.15, "schedule": "cosine", "warmup": 0.03} | {"batch_size": 128, "seq_len": 1024},
        {},
        {"optim": "mofo", "alpha": 0.05, "lr": 1e-5, "schedule": "cosine", "batch_size": 64},
    ),
}


def preset(name: str, *, dpo: bool, rounds: int) -> Mapping[str, Any]:
    """The settings of a paper for a task.

    Args:
        rounds: how many data sets there are; TRACE has eight, each with its own number of epochs.

    Raises:
        OptionError: there is no such paper, or it has no such task.
    """
    found = PRESETS.get(name)
    if found is None:
        raise OptionError(f"`preset` takes {', '.join(PRESETS)}, not {name!r}.")
    values = found.preferences if dpo else found.rounds if rounds > 1 else found.tuning
    if not values:
        task = "preferences" if dpo else "several `data`"
        raise OptionError(f"`preset` {name}: its paper ({found.source}) trains on no {task}. Leave it out.")
    return {**values, "epochs": TRACE} if rounds == len(TRACE) else values
