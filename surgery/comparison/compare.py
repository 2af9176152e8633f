"""Compare models: how much of the fine-tuned task each kept, and how much it forgot (`surgery compare`).

    retention     mean over the tasks of the model's score as a share of ft's
    average       mean over the general measures
    forgetting    pre's average − the model's

Shares (accuracy, exact match) count as they are, so that forgetting is in points of accuracy, as in the papers. A loss or
perplexity counts as how likely the model finds a token compared with a reference, exp(loss_reference − loss): for a task that of
ft, for a general measure that of pre, whose own is 1 then. A row is Pareto-optimal if no other keeps more and forgets no more,
or keeps as much and forgets less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from surgery import provenance
from surgery.errors import CheckpointError
from surgery.evaluation.bench import Observe, Scored
from surgery.evaluation.scores import Floats, Measure, against, limits
from surgery.evaluation.scoring import Scoring
from surgery.evaluation.subject import Subject
from surgery.text import csv_lines

STOPPED = "It was stopped: only the models that were done by then are here."
COLUMNS = (
    *("label", "checkpoint", "method", "fingerprint", "downstream", "retention", "retention_low", "retention_high"),
    *("average", "forgetting", "forgetting_low", "forgetting_high", "distance", "effective_sparsity", "pareto"),
)


@dataclass(frozen=True)
class Outcome:
    """The scores of a model in a comparison, with 95% bootstrap intervals over the items.

    A number is None if it is not defined: a share of a score of zero, or a loss that is not finite.
    """

    downstream: float | None
    retention: float | None
    retention_interval: tuple[float, float] | None
    average: float | None
    forgetting: float | None
    forgetting_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Plane:
    """The pair that models are compared with, and the measures.

    Args:
        pre, ft: the pair, scored.
        tasks, general: the measures of the task and of general ability; every model was scored on them.
    """

    pre: Scored
    ft: Scored
    tasks: Sequence[Measure]
    general: Sequence[Measure]

    def outcome(self, model: Scored) -> Outcome:
        """Compute retention, forgetting and their intervals for a model."""
        names = [measure.name for measure in self.general]
        downstream = [
            against(measure.kind, model.scores[measure.name].mean, self.ft.scores[measure.name].mean)
            for measure in self.tasks
        ]
        average = float(np.mean([_level(model, self.pre, name) for name in names])) if names else None
        base = float(np.mean([_level(self.pre, self.pre, name) for name in names])) if names else None
        kept = self._retention(model, resampled=False)
        forgotten = None if average is None or base is None else base - average
        return Outcome(
            _finite(float(np.mean(downstream))) if downstream else None,
            _finite(None if kept is None else float(kept)),
            _interval(self._retention(model, resampled=True)),
            _finite(average),
            _finite(forgotten),
            _interval(self._forgetting(model)),
        )

    def _retention(self, model: Scored, *, resampled: bool) -> Floats | None:
        shares = []
        for measure in self.tasks:
            own, reference = model.scores[measure.name], self.ft.scores[measure.name]
            if len(own.values) != len(reference.values):
                return None
            mean, base = (scores.resampled() if resampled else np.array(scores.mean) for scores in (own, reference))
            with np.errstate(all="ignore"):
                shares.append(against(measure.kind, mean, base) / against(measure.kind, base, base))
        return np.mean(shares, axis=0) if shares else None

    def _forgetting(self, model: Scored) -> Floats | None:
        losses = []
        for measure in self.general:
            own, reference = model.scores[measure.name], self.pre.scores[measure.name]
            if len(own.values) != len(reference.values):
                return None
            mean, base = own.resampled(), reference.resampled()
            losses.append(against(measure.kind, base, base) - against(measure.kind, mean, base))
        return np.mean(losses, axis=0) if losses else None


def compare(
    subjects: Sequence[Subject],
    tasks: Sequence[Measure],
    general: Sequence[Measure],
    scoring: Scoring,
    *,
    command: Sequence[str] = (),
    observe: Observe = lambda *_: None,
) -> dict[str, Any]:
    """Score models and compare them.

    Args:
        subjects: pre, ft, and others, with labels that differ.
        tasks, general: as `scoring` makes them.
        command: what the user typed.
        observe: called with the progress: label, measure, done, total.

    Returns:
        The content of results.json. After Ctrl-C "stopped" is true and only models that were done have rows. A model other than
        pre and ft that cannot be scored has no row, and a sentence in "failed" and in the notes.

    Raises:
        SurgeryError: pre or ft cannot be scored, or a measure or an option does not fit them.
        KeyboardInterrupt: Ctrl-C before pre and ft were done.
    """
    begun, done, failed, stopped = time.monotonic(), list[Scored](), list[str](), False
    with scoring.bench([*tasks, *general], observe) as bench:
        try:
            for subject in subjects:
                try:
                    done.append(bench.score(subject))
                except CheckpointError as error:
                    if len(done) < 2:
                        raise
                    failed.append(f"The row {subject.label} is left out: {error}")
        except KeyboardInterrupt:
            if len(done) < 2:
                raise
            stopped = True
    plane = Plane(done[0], done[1], tasks, general)
    notes = [*failed, *([STOPPED] if stopped else [])]
    found = document(plane, done[2:], command=command, notes=notes, seconds=time.monotonic() - begun)
    return found | {"stopped": stopped, "failed": failed}


def document(
    plane: Plane,
    models: Iterable[Scored],
    *,
    kind: str = "compare",
    command: Sequence[str] = (),
    notes: Sequence[str] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Return everything about a comparison, down to items: the content of results.json.

    Args:
        models: the others; pre and ft come first.
        kind: "compare" or "sweep".
        command: what the user typed.
    """
    scored = [plane.pre, plane.ft, *models]
    rows = [
        _row(plane, model, role) for model, role in zip(scored, ("pre", "ft", *["other"] * len(scored)), strict=False)
    ]
    for row, optimal in zip(rows, _pareto(rows), strict=True):
        row["pareto"] = optimal
    measures = [(measure, "task") for measure in plane.tasks] + [(measure, "general") for measure in plane.general]
    return {
        "kind": kind,
        "command": list(command),
        "versions": provenance.versions() | {"transformers": version("transformers")},
        "notes": [*_tokens(plane, scored), *_nothing(plane, scored), *_thought(plane, scored), *notes],
        "pre": provenance.origin(plane.pre.subject.checkpoint),
        "ft": provenance.origin(plane.ft.subject.checkpoint),
        "measures": [
            {
                "name": measure.name,
                "role": role,
                "kind": measure.kind,
                "items": len(plane.pre.scores[measure.name].values),
                "settings": measure.settings,
            }
            for measure, role in measures
        ],
        "rows": rows,
        "items": {measure.name: _items(scored, measure.name) for measure, _ in measures},
        "seconds": seconds,
    }


def as_csv(found: dict[str, Any]) -> bytes:
    """Return the rows as CSV in UTF-8, one line for each model; an unknown number is an empty field."""
    names = [measure["name"] for measure in found["measures"]]
    parts = ("value", "low", "high", "p")
    turned = [name for name in names if any(name in row["transitions"] for row in found["rows"])]
    head = [*COLUMNS, *(f"{name}: {part}" for name in names for part in parts)]
    head += [f"{name}: {part}" for name in turned for part in ("1→0", "0→1")]
    lines = (
        [
            *(row[name] for name in COLUMNS),
            *(row["scores"][name][part] for name in names for part in parts),
            *(row["transitions"].get(name, {}).get(part) for name in turned for part in ("lost", "gained")),
        ]
        for row in found["rows"]
    )
    return csv_lines([head, *lines])


def items_as_csv(found: dict[str, Any]) -> bytes:
    """Return the scores of all items as CSV in UTF-8, one line for each model and item."""
    lines = (
        (name, number, label, value, weight)
        for name, held in found["items"].items()
        for label, values in held["values"].items()
        for number, (value, weight) in enumerate(
            zip(values, held["other_weights"].get(label, held["weights"]), strict=True)
        )
    )
    return csv_lines([("measure", "item", "label", "value", "weight"), *lines])


def _row(plane: Plane, model: Scored, role: str) -> dict[str, Any]:
    subject, outcome = model.subject, plane.outcome(model)
    retention, forgetting = outcome.retention_interval or (None, None), outcome.forgetting_interval or (None, None)
    return {
        "label": subject.label,
        "role": role,
        "checkpoint": subject.checkpoint.source.typed,
        "method": subject.method,
        "parameters": subject.parameters,
        "command": subject.command,
        "fingerprint": model.fingerprint,
        "scores": {name: _score(model, plane.ft, name, role) for name in model.scores},
        "transitions": {
            name: asdict(found)
            for name in model.scores
            if role != "pre" and (found := model.scores[name].transitions(plane.pre.scores[name]))
        },
        "downstream": outcome.downstream,
        "retention": outcome.retention,
        "retention_low": retention[0],
        "retention_high": retention[1],
        "average": outcome.average,
        "forgetting": outcome.forgetting,
        "forgetting_low": forgetting[0],
        "forgetting_high": forgetting[1],
        "distance": model.distance,
        "effective_sparsity": model.effective_sparsity,
    }


def _score(model: Scored, ft: Scored, name: str, role: str) -> dict[str, Any]:
    scores, reference = model.scores[name], ft.scores[name]
    low, high = scores.interval()
    same = np.array_equal(scores.weights, reference.weights)
    return {
        "value": _finite(scores.value),
        "low": _finite(low),
        "high": _finite(high),
        "p": scores.paired_p(reference) if same and role != "ft" else None,
        **{key: _finite(value) for key, value in scores.extra.items()},
    }


def _items(models: Sequence[Scored], name: str) -> dict[str, Any]:
    held = {model.subject.label: model.scores[name] for model in models}
    first = models[0].scores[name]
    return {
        "weights": first.weights.tolist(),
        # Another tokenizer makes another number of tokens, and may make another number of windows.
        "other_weights": {
            label: scores.weights.tolist()
            for label, scores in held.items()
            if not np.array_equal(scores.weights, first.weights)
        },
        "values": {label: [_finite(value) for value in scores.values.tolist()] for label, scores in held.items()},
        "items": {label: list(scores.items) for label, scores in held.items() if len(scores.items)},
    }


def _nothing(plane: Plane, models: Sequence[Scored]) -> list[str]:
    """A sentence for each measure by which every model scores 0: then it compares nothing."""
    return [
        f"Every model scores 0 on {measure.name}. Look at what they wrote (`as_json`): answers may be cut short "
        "(`max_new_tokens`), have another form than the references (`metric`), or be too hard for these models."
        for measure in (*plane.tasks, *plane.general)
        if measure.kind == "share" and all(model.scores[measure.name].value == 0 for model in models)
    ]


def _thought(plane: Plane, models: Sequence[Scored]) -> list[str]:
    """A sentence for each measure whose answers were compared without the reasoning before them."""
    found = []
    for measure in (*plane.tasks, *plane.general):
        count = sum(int(model.scores[measure.name].extra.get("reasoning_removed", 0)) for model in models)
        if count:
            found.append(
                f"{measure.name}: reasoning (<think>…</think>) was taken off {count:,} answers before they were compared; "
                "`keep_reasoning` keeps it."
            )
    return found


def _tokens(plane: Plane, models: Sequence[Scored]) -> list[str]:
    """Return a sentence for each model whose losses are over other tokens than those of ft."""
    names = [measure.name for measure in (*plane.tasks, *plane.general) if measure.kind != "share"]
    return [
        f"{model.subject.label} reads the text in other tokens or windows than ft: losses and perplexities do not compare."
        for model in models
        if any(not np.array_equal(model.scores[name].weights, plane.ft.scores[name].weights) for name in names)
    ]


def _pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Return for each row whether it is Pareto-optimal."""
    points = [(row["retention"], row["forgetting"]) for row in rows]

    def beaten(one: tuple[Any, Any]) -> bool:
        return any(other != one and None not in other and other[0] >= one[0] and other[1] <= one[1] for other in points)

    return [None not in point and not beaten(point) for point in points]


def _level(model: Scored, pre: Scored, name: str) -> float:
    scores = model.scores[name]
    return float(against(scores.kind, scores.mean, pre.scores[name].mean))


def _interval(resampled: Floats | None) -> tuple[float, float] | None:
    return limits(resampled) if resampled is not None and bool(np.isfinite(resampled).all()) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
