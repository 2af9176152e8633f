"""Tasks of lm-evaluation-harness as measures: the harness asks the model that is in memory, and its numbers are reported.

Unless the user names a metric, a task is scored by acc_norm where it has that, else by acc, else by the first of its metrics
that has a value for each item; where it filters answers in several ways (gsm8k: strict-match, then flexible-extract) and
none is named, by the first. A group whose tasks share such a metric is one measure with all their items, weighted so that
their mean is the group's number; in other groups, each task is a measure.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.data.draw import drawn
from surgery.errors import OptionError, SurgeryError, reason
from surgery.evaluation.measures.harness_metrics import READABLE, Metric, apply, measured, part_name
from surgery.evaluation.measures.harness_options import HarnessOptions
from surgery.evaluation.measures.harness_tasks import contained, load_tasks
from surgery.evaluation.scores import Floats, Kind, Measure, Scores

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel

RESAMPLES = 100_000  # the harness's own number
FEW = 2  # of a metric that is not looked at
TOLERANCE = 1e-9  # between sums in another order
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def harness_measures(
    asked: Sequence[tuple[str, HarnessOptions]],
    *,
    limit: int | None = None,
    sample: int | None = None,
    unsafe: bool = False,
    taken: Collection[str] = (),
) -> list[Measure]:
    """The measures of tasks, their data loaded.

    Args:
        asked: names of tasks, groups and tags of the harness, or paths of YAML files (.yaml, .yml), and what is said of each. As
            in the harness, files of data that a YAML file names are looked for from the current folder.
        limit: the first items only, of each task of a group too.
        sample: so many items only, likewise, drawn at random, the same each time.
        unsafe: programs that the model writes are run.
        taken: names that other measures have.

    Raises:
        OptionError: the harness is not installed, there is no such task, or it cannot be scored here.
        HubError: data cannot be fetched.
    """
    if not asked:
        return []
    manager, loaded = load_tasks([name for name, _ in asked], unsafe=unsafe)
    measures: list[Measure] = []
    names = set(taken)
    with contained():
        for (typed, options), tops in zip(asked, loaded, strict=True):
            for top in tops:
                apply(typed, top, options)
                for part, tasks, metric in measured(top, typed, options):
                    name = part_name(part)
                    if name in names:
                        name += "".join(f":{key}={value}" for key, value in options.given().items())
                    names.add(name)
                    measures.append(HarnessTask(part, tasks, metric, limit, manager, options, sample, unsafe, name))
    return measures


@dataclass(eq=False)
class HarnessTask:
    """The measure of a task or group.

    Attributes:
        part: a `Task` or `Group` of the harness.
        tasks: the part itself, or the group's tasks.
        manager: the harness's task manager.
        options: what the user said of it.
        sample: so many items of each task, drawn at random.
        unsafe: programs that the model writes are run.
    """

    part: Any = field(repr=False)
    tasks: list[Any] = field(repr=False)
    metric: Metric
    limit: int | None
    manager: Any = field(repr=False)
    options: HarnessOptions
    sample: int | None
    unsafe: bool
    name: str
    kind: Kind = field(init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.kind = READABLE.get(self.metric.aggregation, "share")
        self.settings = {
            "measure": "lm-evaluation-harness",
            "lm_eval": version("lm_eval"),
            "task": part_name(self.part),
            "version": str(getattr(self.part, "VERSION", None) or self.part.version),
            "metric": self.metric.key,
            "by_size": self.metric.by_size,
            "shots": sorted({task.config.num_fewshot or 0 for task in self.tasks}),
            "limit": self.limit,
            **({"sample": self.sample} if self.sample else {}),
            **({"chat": True} if self.options.chat else {}),
            "config": _digest(task.dump_config() | {"metadata": None} for task in self.tasks),
            "items": _digest(doc for task in self.tasks for doc in _documents(task, self.limit)),
        }

    @property
    def count(self) -> int:
        """How many items are measured."""
        return sum(map(len, self._documents()))

    def _documents(self) -> list[list[int]]:
        """The numbers of the items that are measured, of each task."""
        return [drawn(len(task.eval_docs), self.sample)[: self.limit] for task in self.tasks]

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model.

        Returns:
            Scores whose mean (its exp for a perplexity) is the harness's number; `extra` has its standard error as "stderr".

        Raises:
            OptionError: the harness fails, or its number is not the mean of its items.
        """
        documents = self._documents()
        counts = [len(numbers) for numbers in documents]
        places = self._places(documents, only)
        asked = [task for task, held in zip(self.tasks, places, strict=True) if held is None or held]
        chosen = {
            task.task_name: held for task, held in zip(self.tasks, places, strict=True) if held is not None and held
        }
        found = self._evaluate(model, advance, asked, chosen or None)
        values, weights, items = [], [], []
        for task, count in zip(self.tasks, counts, strict=True):
            if task not in asked:
                continue
            samples = [
                sample
                for sample in found["samples"][task.task_name]
                if sample["filter"] == self.metric.filter and self.metric.name in sample
            ]
            value, weight = _values(self.metric, samples)
            values.append(value)
            weights.append(weight if self.metric.by_size else weight * sum(counts) / (max(count, 1) * len(self.tasks)))
            label = {"task": task.task_name} if len(self.tasks) > 1 else {}
            items += [label | _item(sample) for sample in samples]
        scores = Scores(self.kind, np.concatenate(values), np.concatenate(weights), items)
        if only is not None:
            scores = scores.at(np.argsort(np.argsort(only)).tolist())
        elif not chosen:
            scores = self._checked(scores, found["results"])
        if self.kind == "share" and not (scores.values.min() >= 0 and scores.values.max() <= 1):
            raise OptionError(f"{self.name}: {self.metric.name} is not a share, from 0 to 1. Choose another task.")
        return scores

    def _places(self, documents: Sequence[list[int]], only: Sequence[int] | None) -> list[list[int] | None]:
        """Which of each task's items are measured, in order; None for all of them, or the first up to the limit."""
        if only is None:
            return [*documents] if self.sample else [None for _ in documents]
        ends = np.cumsum([len(numbers) for numbers in documents]).tolist()
        return [
            [numbers[place - end + len(numbers)] for place in sorted(only) if end - len(numbers) <= place < end]
            for end, numbers in zip(ends, documents, strict=True)
        ]

    def _checked(self, scores: Scores, results: dict[str, Any]) -> Scores:
        """The scores with the harness's standard error, if their mean is the harness's number."""
        results = results[part_name(self.part)]
        stderr = results.get(self.metric.stderr) if self.metric.aggregation in READABLE else None
        number = results.get(self.metric.key, math.nan)
        if not len(scores.items) or not math.isclose(scores.value, number, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise OptionError(
                f"{self.name}: {self.metric.name} is {number} by lm-evaluation-harness, which is not the mean of its items. "
                "Choose another task."
            )
        return replace(scores, extra={"stderr": float(stderr)} if isinstance(stderr, (int, float)) else {})

    def _evaluate(
        self, model: LanguageModel, advance: Advance, tasks: list[Any], chosen: dict[str, list[int]] | None
    ) -> dict[str, Any]:
        """The harness's results of the whole part, or of some tasks' chosen items."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        network: Any = model.model
        limit = None if chosen else self.limit
        # The harness would tie weights that the checkpoint has apart, and give the tokenizer a padding token.
        network.tie_weights = lambda: None
        try:
            with contained(unsafe=self.unsafe), model.running(), _explained(self.name):
                asked = HFLM(pretrained=network, tokenizer=copy.deepcopy(model.tokenizer), batch_size=model.batch)
                items = sum(map(len, chosen.values())) if chosen else sum(_count(task, limit) for task in tasks)
                asked.set_cache_hook(_Progress(tasks, items, advance))
                found: dict[str, Any] = simple_evaluate(
                    model=asked,
                    tasks=tasks if chosen else [self.part],
                    limit=limit,
                    samples=chosen,
                    bootstrap_iters=RESAMPLES if self.metric.aggregation == "perplexity" and not chosen else FEW,
                    task_manager=self.manager,
                    apply_chat_template=self.options.chat,
                    confirm_run_unsafe_code=self.unsafe,
                )
        finally:
            del network.tie_weights
        return found


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Inside, an error is the task's fault, but for those that the model itself may raise."""
    try:
        yield
    except (SurgeryError, MemoryError, RuntimeError):
        raise
    except Exception as error:
        raise OptionError(
            f"{name}: lm-evaluation-harness cannot score it ({reason(error)}). Correct the task, or choose another."
        ) from error


class _Progress:
    """Counts answered requests, where the harness would keep them in a cache."""

    def __init__(self, tasks: list[Any], items: int, advance: Advance) -> None:
        self.tasks, self.items, self.advance, self.done, self.requests = tasks, items, advance, 0, 0

    def add_partial(self, *_: object) -> None:
        if not self.requests:  # which the harness makes after this was made
            self.requests = sum(instance.repeats for task in self.tasks for instance in task.instances)
        self.done += 1
        self.advance(self.items * self.done // self.requests, self.items)


def _count(task: Any, limit: int | None) -> int:
    """How many items of a task are measured."""
    return min(len(task.eval_docs), limit or len(task.eval_docs))


def _values(metric: Metric, samples: list[dict[str, Any]]) -> tuple[Floats, Floats]:
    """The items' values and weights, as `Scores` has them."""
    found = [sample[metric.name] for sample in samples]
    if metric.aggregation == "weighted_perplexity":
        likelihoods, counts = np.array(found, np.float64).reshape(-1, 2).T
        return -likelihoods / counts, counts
    if metric.aggregation not in READABLE:
        return np.array([np.mean(one) for one in found]), np.array([len(one) for one in found], np.float64)
    values = np.array(found, np.float64).reshape(-1)
    return values if metric.aggregation == "mean" else -values, np.ones(len(values))


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    """The items of a task: the requests and the answers."""
    requests, answers, target = sample["arguments"], sample["filtered_resps"], sample["target"]
    item: dict[str, Any] = {"prompt": requests[0][0]}
    if len(requests[0]) == 1:
        return item | {"log_likelihood": answers[0]}
    item["target"] = target if isinstance(target, (str, int)) else str(target)
    if isinstance(requests[0][1], str):
        return item | {
            "choices": [continuation for _, continuation in requests],
            "log_likelihoods": [likelihood for likelihood, _ in answers],
        }
    return item | {"answer": answers[0] if isinstance(answers[0], str) else str(answers[0])}


def _documents(task: Any, limit: int | None) -> Iterator[Any]:
    """The items that are scored, and those that examples are taken from."""
    yield from itertools.islice(task.eval_docs, limit)
    if task.config.num_fewshot:
        yield from task.fewshot_docs()


def _digest(values: Iterable[Any]) -> str:
    """The SHA-256 of values, the same in every process."""
    found = hashlib.sha256()
    for value in values:
        found.update(ADDRESS.sub("", json.dumps(value, sort_keys=True, default=str)).encode() + b"\n")
    return found.hexdigest()
