"""The tasks' own tests, asked of a model while it is trained: each --data's score by the measures that `surgery compare` has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from surgery.errors import OptionError
from surgery.evaluation.measures import find_measures
from surgery.evaluation.scores import BasedMeasure, Measure
from surgery.train.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

BATCH = 8  # sequences in one forward pass


def tests(settings: Settings) -> list[Measure]:
    """The measure of each --data's own test, in that order; none where no test is given.

    Raises:
        OptionError: a file or a task is not as it should be, or there are not as many tests as data.
    """
    if settings.eval_data and len(settings.eval_data) != len(settings.data):
        raise OptionError(
            f"`eval_data` is given {len(settings.eval_data)} times, and `data` {len(settings.data)} times. Give each data its "
            "own test, in the same order."
        )
    found: list[Measure] = []
    for spec in settings.eval_data:
        measures = find_measures(
            [spec],
            limit=settings.eval_limit,
            max_new_tokens=settings.max_new_tokens,
            taken=[measure.name for measure in found],
        )
        if len(measures) > 1:
            raise OptionError(
                f"{spec}: names {len(measures)} measures, and a task has one score. Name one, or a group: NAME={spec}."
            )
        if isinstance(measures[0], BasedMeasure):
            raise OptionError(f"{spec}: compares a model with its base, which is no score of a task. Give a file.")
        found += measures
    return found


class Exam:
    """The tests, on one model after another.

    Args:
        measures: of the tasks.
        folder: where the start model's configuration and tokenizer lie.
    """

    def __init__(self, measures: Sequence[Measure], folder: Path) -> None:
        self.measures, self.folder = measures, folder

    def scores(self, network: PreTrainedModel) -> list[float]:
        """Score a model on each task: a share as it is, else minus the loss. Draws at random go on as if nothing was asked.

        Raises:
            SurgeryError: a task cannot be scored on this model.
        """
        import torch

        from surgery.model.language_model import LanguageModel

        drawn = random.getstate(), np.random.get_state()
        found = []
        try:
            with torch.random.fork_rng(), LanguageModel.lent(network, self.folder, batch=BATCH) as model:
                for measure in self.measures:
                    scores = measure.score(model, lambda *_: None)
                    found.append(scores.mean if scores.higher_is_better else -scores.mean)
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
        return found


class EveryFewSteps(TrainerCallback):
    """Ask on the way, and keep the scores in the trainer's log, which a resumed run has again."""

    def __init__(self, exam: Exam, every: int) -> None:
        self.exam, self.every = exam, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step, "scores": self.exam.scores(model)})
