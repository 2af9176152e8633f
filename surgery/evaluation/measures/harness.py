"""Tasks of lm-evaluation-harness as measures: the harness asks the model that is in memory, and its numbers are reported.

A task is scored by acc_norm where it has that, else by acc, else by the first of its metrics that has a value for each item;
where it filters answers in several ways (gsm8k: strict-match, then flexible-extract), by the first. A group whose tasks share
such a metric is one measure with all their items, weighted so that their mean is the group's number; in other groups, each task
is a measure.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import OptionError, SurgeryError, reason
from surgery.evaluation.measures.harness_tasks import contained, load_tasks
from surgery.evaluation.scores import Floats, Kind, Measure, Scores

if TYPE_CHECKING:
    from surgery.model.language_model import Advance, LanguageModel

PREFERRED = ("acc_norm", "acc")
# Aggregations of the harness whose numbers are means of values that each item has, and what the values are.
READABLE: dict[str, Kind] = {"mean": "share", "perplexity": "perplexity", "weighted_perplexity": "perplexity"}
RESAMPLES = 100_000  # the harness's own number
FEW = 2  # of a metric that is not looked at
TOLERANCE = 1e-9  # between sums in another order
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def harness_measures(names: Sequence[str], *, limit: int | None = None) -> list[Measure]:
    """The measures of tasks, their data loaded.

    Args:
        names: of tasks, groups and tags of the harness, or paths of YAML files (.yaml, .yml). As in the harness, files of data
            that a YAML file names are looked for from the current folder.
        limit: the first items only, of each task of a group too.

    Raises:
        OptionError: the harness is not installed, there is no such task, or it cannot be scored here.
        HubError: data cannot be fetched.
    """
    if not names:
        return []
    manager, parts = load_tasks(names)
    with contained():
        return [
            HarnessTask(part, tasks, metric, limit, manager) for top in parts for part, tasks, metric in _measured(top)
        ]


@dataclass(frozen=True)
class Metric:
    """A number of the harness.

    Attributes:
        key: as in its results: metric,filter.
        aggregation: a key of READABLE.
        by_size: of a group: whether each item counts the same, rather than each task.
    """

    name: str
    filter: str
    aggregation: str
    by_size: bool = True

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"

    @property
    def stderr(self) -> str:
        return f"{self.name}_stderr,{self.filter}"


@dataclass(eq=False)
class HarnessTask:
    """The measure of a task or group.

    Attributes:
        part: a `Task` or `Group` of the harness.
        tasks: the part itself, or the group's tasks.
        manager: the harness's task manager.
    """

    part: Any = field(repr=False)
    tasks: list[Any] = field(repr=False)
    metric: Metric
    limit: int | None
    manager: Any = field(repr=False)
    name: str = field(init=False)
    kind: Kind = field(init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.name = _name(self.part)
        self.kind = READABLE[self.metric.aggregation]
        self.settings = {
            "measure": "lm-evaluation-harness",
            "lm_eval": version("lm_eval"),
            "task": self.name,
            "version": str(getattr(self.part, "VERSION", None) or self.part.version),
            "metric": self.metric.key,
            "by_size": self.metric.by_size,
            "shots": sorted({task.config.num_fewshot or 0 for task in self.tasks}),
            "limit": self.limit,
            "config": _digest(task.dump_config() | {"metadata": None} for task in self.tasks),
            "items": _digest(doc for task in self.tasks for doc in _documents(task, self.limit)),
        }

    def score(self, model: LanguageModel, advance: Advance, only: Sequence[int] | None = None) -> Scores:
        """Measure a model.

        Returns:
            Scores whose mean (its exp for a perplexity) is the harness's number; `extra` has its standard error as "stderr".

        Raises:
            OptionError: the harness fails, or its number is not the mean of its items.
        """
        counts = [_count(task, self.limit) for task in self.tasks]
        places = self._places(counts, only)
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
            whole = len(weight) if only is None else count
            weights.append(weight if self.metric.by_size else weight * sum(counts) / (max(whole, 1) * len(self.tasks)))
            label = {"task": task.task_name} if len(self.tasks) > 1 else {}
            items += [label | _item(sample) for sample in samples]
        scores = Scores(self.kind, np.concatenate(values), np.concatenate(weights), items)
        scores = (
            self._checked(scores, found["results"])
            if only is None
            else scores.at(np.argsort(np.argsort(only)).tolist())
        )
        if self.kind == "share" and not (scores.values.min() >= 0 and scores.values.max() <= 1):
            raise OptionError(f"{self.name}: {self.metric.name} is not a share, from 0 to 1. Choose another task.")
        return scores

    def _places(self, counts: Sequence[int], only: Sequence[int] | None) -> list[list[int] | None]:
        """Which of each task's items are measured, in order; None for all of them."""
        ends = np.cumsum(counts)
        return [
            None if only is None else sorted(place - end + count for place in only if end - count <= place < end)
            for end, count in zip(ends.tolist(), counts, strict=True)
        ]

    def _checked(self, scores: Scores, results: dict[str, Any]) -> Scores:
        """The scores with the harness's standard error, if their mean is the harness's number."""
        results = results[self.name]
        stderr = results.get(self.metric.stderr)
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
            with contained(), model.running(), _explained(self.name):
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
                )
        finally:
            del network.tie_weights
        return found


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong inside is the task's fault, but for what the model itself may raise."""
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


def _measured(part: Any) -> list[tuple[Any, list[Any], Metric]]:
    """What is measured of a task or group: the part, its tasks, and the metric."""
    if not hasattr(part, "get_all_tasks"):
        metrics = _metrics(part)
        if not metrics:
            raise OptionError(
                f"{_name(part)}: none of its metrics ({', '.join(part.aggregation())}) is a share of right answers or a "
                "perplexity, with a value for each item. Choose another task."
            )
        return [(part, [part], _preferred(metrics))]
    tasks = part.get_all_tasks()
    shared = [
        {metric.key: metric for metric in _metrics(task, every_filter=True) if metric.aggregation == "mean"}
        for task in tasks
    ]
    found = []
    for rule in part.aggregate_metric_list or ():
        of_rule = [metric for metric in (shared[0] if shared else {}).values() if metric.name == rule.metric]
        found += [
            replace(metric, by_size=rule.weight_by_size)
            for metric in of_rule
            if metric.filter in (rule.filter_list or [metric.filter]) and all(metric.key in other for other in shared)
        ]
    if found:
        return [(part, tasks, _preferred(found))]
    return [measured for child in part for measured in _measured(child)]


def _metrics(task: Any, *, every_filter: bool = False) -> list[Metric]:
    """The metrics of a task that can be read, in its order; with its first filter, or with each."""
    from lm_eval.api.registry import get_aggregation

    filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
    higher = task.higher_is_better()
    return [
        Metric(name, filter_, aggregation)
        for name, function in task.aggregation().items()
        for aggregation, kind in READABLE.items()
        if function is get_aggregation(aggregation) and bool(higher.get(name)) == (kind == "share")
        for filter_ in (filters if every_filter else filters[:1])
    ]


def _preferred(metrics: list[Metric]) -> Metric:
    for name in PREFERRED:
        for metric in metrics:
            if metric.name == name:
                return metric
    return metrics[0]


def _values(metric: Metric, samples: list[dict[str, Any]]) -> tuple[Floats, Floats]:
    """The items' values and weights, as `Scores` has them."""
    found = [sample[metric.name] for sample in samples]
    if metric.aggregation == "weighted_perplexity":
        likelihoods, counts = np.array(found, np.float64).reshape(-1, 2).T
        return -likelihoods / counts, counts
    values = np.array(found, np.float64).reshape(-1)
    return values if metric.aggregation == "mean" else -values, np.ones(len(values))


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    """What was asked and answered."""
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


def _name(part: Any) -> str:
    return str(part.name if hasattr(part, "get_all_tasks") else part.task_name)
