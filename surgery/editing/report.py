"""Describe a run: surgery-report.json for programs, and the output's model card for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engines.results import Result
from surgery.layout import CATEGORIES
from surgery.methods import METHODS
from surgery.methods.actions import (
    Action,
    Blend,
    Keep,
    KeepSalient,
    Merge,
    Prune,
    PruneRows,
    Reset,
    Shrink,
    Soften,
    Step,
)
from surgery.option import with_flags
from surgery.text import readable, words

ACTIONS: dict[type[Action], str] = {
    Keep: "kept",
    Reset: "reset",
    Prune: "pruned",
    PruneRows: "pruned",
    KeepSalient: "pruned",
    Shrink: "shrunk",
    Soften: "softened",
    Blend: "averaged",
    Merge: "merged",
}


@dataclass(frozen=True)
class Summary:
    """The counts of a group of tensors.

    pruned counts entries that went back to pre by choice (None where no tensor has such a choice, as in an average), equal those
    whose value in the output is pre's. before and after are
    the distance D of MoFO's D.4, mean over tensors of ‖θ − θ0‖ / ‖θ0‖, of ft and of the output. Tensors with a base of norm
    zero have no such ratio and are left out of it.
    """

    tensors: int
    entries: int
    pruned: int | None
    equal: int
    before: float | None
    after: float | None


def describe(step: Step, result: Result) -> dict[str, Any]:
    """One tensor's line of the report."""
    entries = step.ft.entries
    line: dict[str, Any] = {
        "name": step.ft.name,
        "layer": step.place.layer,
        "category": step.place.category,
        "dtype": step.ft.dtype,
        "shape": list(step.ft.shape),
        "action": _action(step),
        "entries": entries,
        "kept": result.kept,
        "pruned": result.pruned,
        "differ": result.differ,
        "achieved_sparsity": _ratio(result.pruned, entries),
        "effective_sparsity": None if result.differ is None else _ratio(entries - result.differ, entries),
        "distance_before": _norm_ratio(result.before2, result.weight2),
        "distance_after": _norm_ratio(result.after2, result.weight2),
    }
    line["checksum"] = result.checksum
    if isinstance(step.action, Blend):
        line["alpha"] = step.action.alpha
    if isinstance(step.action, Prune | PruneRows):
        line["sparsity"] = step.action.sparsity
    if isinstance(step.action, Prune):
        line["top"] = step.action.top
    if step.added is not None:
        line["new_rows"] = step.added.shape[0]
    if result.nonfinite:
        line["nonfinite"] = True
    return line


def summarize(lines: Iterable[dict[str, Any]]) -> Summary:
    """Add up the lines of the tensors that have a base."""
    paired = [line for line in lines if line["differ"] is not None]
    ratios = [line for line in paired if line["distance_before"] is not None]
    return Summary(
        tensors=len(paired),
        entries=sum(line["entries"] for line in paired),
        pruned=sum(chosen) if (chosen := [line["pruned"] for line in paired if line["pruned"] is not None]) else None,
        equal=sum(line["entries"] - line["differ"] for line in paired),
        before=_mean([line["distance_before"] for line in ratios]),
        after=_mean([line["distance_after"] for line in ratios]),
    )


def by_category(lines: Sequence[dict[str, Any]]) -> dict[str, Summary]:
    """Return a summary for each category that occurs."""
    groups = {category: [line for line in lines if line["category"] == category] for category in CATEGORIES}
    return {category: summarize(group) for category, group in groups.items() if group}


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON, with its shares."""
    return {
        "tensors": summary.tensors,
        "entries": summary.entries,
        "pruned": summary.pruned,
        "differ": summary.entries - summary.equal,
        "achieved_sparsity": _ratio(summary.pruned, summary.entries),
        "effective_sparsity": _ratio(summary.equal, summary.entries),
        "distance_before": summary.before,
        "distance_after": summary.after,
    }


def model_card(report: dict[str, Any], card_name: str) -> str:
    """Return the output's README.md: a model card with base models, method, results, and the command."""
    pre, ft, totals, others = report["pre"], report["ft"], report["totals"], report.get("others", [])
    # A card may name only hub ids; a local folder's own name has the form of one.
    bases = [json.dumps(source["repo"] or Path(source["folder"]).name) for source in (ft, *others, pre)]
    header = ["---", "base_model:", *(f"- {base}" for base in bases), "base_model_relation: merge"]
    header += ["library_name: transformers", "tags:", "- surgery", f"- {report['method']}", "---", ""]
    merged = f"merged with {', '.join(f'`{_source(other)}`' for other in others)} and " if others else ""
    parameters = ", ".join(f"{key} {json.dumps(value)}" for key, value in report["parameters"].items())
    body = [
        f"# {readable(card_name)}",
        "",
        f"The fine-tuned model `{_source(ft)}`, {merged}edited towards the pre-trained `{_source(pre)}` with "
        f"surgery {report['versions']['surgery']} (`pip install model-surgery`): {METHODS[report['method']].about}.",
        "",
        f"- parameters: {parameters}",
        f"- entries with a base: {totals['entries']:,}, of which {totals['differ']:,} differ from the pre-trained model",
    ]
    if totals["distance_before"] is not None:
        body.append(
            f"- distance from the pre-trained model (mean of ‖θ − θ0‖ / ‖θ0‖ over tensors): {totals['distance_before']:.4g} "
            f"before, {totals['distance_after']:.4g} after"
        )
    if report["notes"]:
        body += ["", *(f"- {_plain(with_flags(note))}" for note in report["notes"])]
    body += [
        "",
        "```",
        words(report["command"]),
        "```",
        "",
        "What happened to each tensor is in `surgery-report.json`.",
        "",
    ]
    return "\n".join(header + body)


def _plain(note: str) -> str:
    """A note as Markdown that is nothing but text, whatever names are in it."""
    return re.sub(r"([\\`*_<>\[\]!#|])", r"\\\1", readable(note))


def _source(source: dict[str, Any]) -> str:
    return readable(f"{source['repo']}@{source['revision']}" if source["repo"] else source["typed"])


def _action(step: Step) -> str:
    if step.pre is None:
        return "copied"
    return ACTIONS[type(step.action)]


def _ratio(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole


def _norm_ratio(part2: float | None, whole2: float | None) -> float | None:
    if part2 is None or not whole2 or not math.isfinite(part2 + whole2):
        return None
    return math.sqrt(part2 / whole2)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
