"""Write the report of a training: surgery-report.json, surgery-train.yaml (its settings, for --config) and the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from surgery.checkpoint.hub import resolve
from surgery.checkpoint.item import Item
from surgery.checkpoint.listing import REPORT, listing
from surgery.checkpoint.source import Checkpoint
from surgery.diff import measure as diff
from surgery.editing.moved import moved
from surgery.editing.report import as_json, by_category, summarize
from surgery.editing.verify import stored
from surgery.evaluation.scores import Measure
from surgery.layout import place
from surgery.provenance import origin, versions
from surgery.text import dumps, readable, words
from surgery.train.adapter import beside_the_weights
from surgery.train.settings import Settings

SETTINGS = "surgery-train.yaml"
LIBRARIES = ("transformers", "trl", "accelerate", "datasets", "peft")


def document(
    settings: Settings,
    checkpoint: Checkpoint,
    rounds: list[dict[str, Any]],
    scores: list[list[float]],
    measures: Sequence[Measure],
    result: Path,
    command: Sequence[str],
) -> dict[str, Any]:
    """Return the report, with distances from the start model measured on the files that were written.

    Its `pre` is the start model, from which `distance_before` is 0; there is no `ft`. Of a LoRA adapter, totals and categories
    tell of the model that it makes, and the lines of `tensors` of its own; a learnt prompt leaves the model as it is.

    Args:
        scores: [round][task] after each round; empty where nothing was scored.
        measures: of the tasks; none where the scores are minus the loss of held-out answers.
        result: the folder that becomes the output.
    """
    changed = checkpoint.folder if beside_the_weights(settings) else result
    both = diff.prepare(str(checkpoint.folder), str(changed))
    lines = moved(both.items)
    own = lines
    if settings.keep_adapter:
        tensors = stored(resolve(str(result), companions=False)).values()
        own = moved([Item(tensor, None, place(tensor.name)) for tensor in tensors])
    return {
        "method": "train",
        "command": list(command),
        "pre": origin(checkpoint),
        "ft": None,
        "output": settings.out.name,
        "versions": versions() | {name: version(name) for name in LIBRARIES},
        "notes": both.notes,
        "settings": settings.as_json(),
        "rounds": rounds,
        "continual": continual(scores) | {"tasks": _tasks(rounds, measures)} if scores else None,
        "totals": as_json(summarize(lines)),
        "categories": {name: as_json(group) for name, group in by_category(lines).items()},
        "tensors": own,
    }


def continual(scores: list[list[float]]) -> dict[str, Any]:
    """OP_t = (1/t) Σ_{i≤t} S_{t,i} and BWT_t = (1/t) Σ_{i<t} (S_{t,i} − S_{i,i}) after each round t (HFT A.2.2).

    The score S_{t,i} is that of task i after round t: higher is better, and a BWT below 0 is forgetting.
    """
    count = len(scores)
    return {
        "scores": scores,
        "op": [sum(scores[t][: t + 1]) / (t + 1) for t in range(count)],
        "bwt": [sum(scores[t][i] - scores[i][i] for i in range(t)) / (t + 1) for t in range(count)],
    }


def _tasks(rounds: list[dict[str, Any]], measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Name each task and its score."""
    if not measures:
        return [
            {"name": Path(round["data"]).stem, "score": "minus the loss of held-out answers", "settings": {}}
            for round in rounds
        ]
    return [
        {
            "name": measure.name,
            "score": "a share" if measure.kind == "share" else "minus the loss",
            "settings": measure.settings,
        }
        for measure in measures
    ]


def said(tasks: Sequence[dict[str, Any]]) -> str:
    """Say in a sentence how some tasks are scored."""
    kinds = list(dict.fromkeys(task["score"] for task in tasks))
    if kinds == ["a share"]:
        return "Scores are the tasks' own: " + ", ".join(
            f"{task['name']} by {task['settings'].get('metric', task['settings']['measure'])}" for task in tasks
        )
    if len(kinds) == 1:
        return f"Scores are {kinds[0]}, for want of another: name each task's own test with `eval_data` FILE:METRIC"
    lost = ", ".join(task["name"] for task in tasks if task["score"] != "a share")
    return f"Scores are the tasks' own, but minus the loss of {lost}: OP and BWT mix the two"


def write(found: dict[str, Any], settings: Settings, result: Path) -> None:
    """Write report, settings and model card beside the weights."""
    import yaml

    (result / SETTINGS).write_text(
        yaml.safe_dump(settings.as_json(), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    (result / "README.md").write_text(_card(found, settings), encoding="utf-8", errors="backslashreplace")
    found["files"] = listing(result)
    (result / REPORT).write_bytes(dumps(found))


def _card(found: dict[str, Any], settings: Settings) -> str:
    """Return a model card: base model, training, and the command."""
    model, totals = found["pre"], found["totals"]
    base = json.dumps(model["repo"] or Path(model["folder"]).name)
    relation = "adapter" if settings.keep_adapter else "finetune"
    header = ["---", f"base_model: {base}", f"base_model_relation: {relation}"]
    header += ["library_name: transformers", "tags:", "- surgery", f"- {settings.optim}", "---", ""]
    steps = [step for round in found["rounds"] for step in round["steps"]]
    body = [
        f"# {readable(settings.out.name)}",
        "",
        f"`{readable(model['repo'] or model['typed'])}`, fine-tuned with surgery {found['versions']['surgery']} (`pip install "
        f"model-surgery`): {settings.task}, optimizer {settings.optim}, {len(steps):,} steps of {settings.batch} sequences.",
        "",
        f"- loss: {steps[0]['loss']:.4g} in the first step, {steps[-1]['loss']:.4g} in the last",
    ]
    if totals["distance_after"] is not None:
        body.append(f"- distance from the start (mean of ‖θ − θ0‖ / ‖θ0‖ over tensors): {totals['distance_after']:.4g}")
    body += [
        "",
        "```",
        words(found["command"]),
        "```",
        "",
        f"Settings are in `{SETTINGS}`, every step and every tensor in `{REPORT}`.",
        "",
    ]
    return "\n".join(header + body)
