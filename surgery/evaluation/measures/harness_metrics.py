"""Choose the number of a task of lm-evaluation-harness that is read: one that is the mean of a value for each item."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from surgery.errors import OptionError
from surgery.evaluation.measures.harness_options import HarnessOptions
from surgery.evaluation.scores import Kind

PREFERRED = ("acc_norm", "acc")
# Aggregations of the harness whose numbers are means of values that each item has, and what the values are.
READABLE: dict[str, Kind] = {"mean": "share", "perplexity": "perplexity", "weighted_perplexity": "perplexity"}
# Of an aggregation of a task's own, which is looked at from outside: a mean, or that of lists of shares put one behind the other.
FLAT = "flat"
PROBES: dict[str, list[Any]] = {"mean": [1.0, 0.0, 0.0, 0.0, 1.0], FLAT: [[True, False, False], [False, True]]}
PROBED = 0.4


@dataclass(frozen=True)
class Metric:
    """A number of the harness.

    Attributes:
        key: as in its results: metric,filter.
        aggregation: a key of READABLE, or FLAT.
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


def apply(typed: str, part: Any, options: HarnessOptions) -> None:
    """Set what the user said in the configuration of a task, or of all tasks of a group.

    Raises:
        OptionError: it does not go with one.
    """
    for task in part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part]:
        if options.shots is not None:
            task.set_config("num_fewshot", options.shots)
        if not options.generation and options.samples is None:
            continue
        if task.OUTPUT_TYPE != "generate_until":
            raise OptionError(
                f"{typed}: {task.task_name} generates no answers, so samples, temperature and top_p do not go with it. Leave "
                "them out."
            )
        if (options.samples or 1) > 1 and not _programs(task):
            raise OptionError(
                f"{typed}: only the first answer to each question of {task.task_name} would be looked at. Leave samples out."
            )
        task.set_config("generation_kwargs", {**task.config.generation_kwargs, **options.generation})
        if options.samples is not None:
            task.set_config("repeats", options.samples)
            for kwargs in _programs(task):
                kwargs["k"] = list(range(1, options.samples + 1))


def _programs(task: Any) -> list[dict[str, Any]]:
    """The arguments of a task's metrics that take several programs for each problem."""
    return [kwargs for kwargs in _arguments(task).values() if "k" in kwargs]


def _arguments(task: Any) -> dict[str, dict[str, Any]]:
    """The arguments of a task's metrics."""
    return getattr(task, "_metric_fn_kwargs", {})


def measured(part: Any, typed: str, options: HarnessOptions) -> list[tuple[Any, list[Any], Metric]]:
    """The parts of a task or group that are measured, each as the part, its tasks, and the metric.

    Raises:
        OptionError: it has no metric that can be read, or not the one that the user named.
    """
    if not hasattr(part, "get_all_tasks"):
        metrics = _metrics(part)
        if not metrics:
            raise OptionError(
                f"{part_name(part)}: none of its metrics ({', '.join(part.aggregation())}) is a share of right answers or a "
                "perplexity, with a value for each item. Choose another task."
            )
        return [(part, [part], _chosen(typed, part, metrics, options))]
    tasks = part.get_all_tasks()
    shared = [{metric.key: metric for metric in _metrics(task) if metric.aggregation == "mean"} for task in tasks]
    found = []
    for rule in part.aggregate_metric_list or ():
        of_rule = [metric for metric in (shared[0] if shared else {}).values() if metric.name == rule.metric]
        found += [
            replace(metric, by_size=rule.weight_by_size)
            for metric in of_rule
            if metric.filter in (rule.filter_list or [metric.filter]) and all(metric.key in other for other in shared)
        ]
    if found:
        return [(part, tasks, _chosen(typed, part, found, options))]
    return [one for child in part for one in measured(child, typed, options)]


def _chosen(typed: str, part: Any, metrics: list[Metric], options: HarnessOptions) -> Metric:
    """The metric that the user named, or the one that comes first where none is named.

    Raises:
        OptionError: there is none of that name, or not with that filter.
    """
    for key, names in (
        ("metric", [metric.name for metric in metrics]),
        ("filter", [metric.filter for metric in metrics if options.metric in (None, metric.name)]),
    ):
        wanted = getattr(options, key)
        if wanted is not None and wanted not in names:
            raise OptionError(
                f"{typed}: {part_name(part)} has no {key} {wanted} that can be read item by item. Choose from "
                f"{', '.join(dict.fromkeys(names))}."
            )
    fitting = [metric for metric in metrics if options.metric in (None, metric.name)]
    first = options.filter or fitting[0].filter
    return _preferred([metric for metric in fitting if metric.filter == first])


def _metrics(task: Any) -> list[Metric]:
    """The metrics of a task that can be read, in its order, with each of its filters."""
    filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
    higher = task.higher_is_better()
    found = []
    for name, function in task.aggregation().items():
        aggregation = _aggregation(function)
        if aggregation is None or bool(higher.get(name)) != (READABLE.get(aggregation, "share") == "share"):
            continue
        many = _arguments(task).get(name, {}).get("k")
        names = [f"pass@{k}" for k in many] if isinstance(many, list) else [name]
        found += [Metric(one, filter_, aggregation) for filter_ in filters for one in names]
    return found


def _aggregation(function: Callable[[Any], Any]) -> str | None:
    """The name of an aggregation that can be read: of READABLE, or FLAT; None for another one."""
    from lm_eval.api.registry import get_aggregation

    for name in READABLE:
        if function is get_aggregation(name):
            return name
    for name, example in PROBES.items():
        with suppress(Exception):  # which was made for other values
            if math.isclose(function(example), PROBED):
                return name
    return None


def _preferred(metrics: list[Metric]) -> Metric:
    for name in PREFERRED:
        for metric in metrics:
            if metric.name == name:
                return metric
    return metrics[0]


def part_name(part: Any) -> str:
    """The name of a task or group."""
    return str(part.name if hasattr(part, "get_all_tasks") else part.task_name)
