"""Print the plan and the report of an edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.display import new_console, new_table, print_notes, say, show_json
from surgery.text import count, duration, fixed, label, share, size

if TYPE_CHECKING:
    from surgery.checkpoint.part import Part
    from surgery.editing.job import Job
    from surgery.editing.run import Outstanding
    from surgery.methods.actions import Step


def show_plan(job: Job, *, device: str, as_json: bool) -> None:
    """Print the plan of a job, by category, and the device in words."""
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in job.steps:
        doing = "copy" if step.pre is None or not step.ft.is_float else type(step.action).__name__.lower()
        groups.setdefault((step.place.category, doing), []).append(step)
    sizes = {
        group: (len(steps), sum(step.ft.entries for step in steps), sum(step.ft.nbytes for step in steps))
        for group, steps in sorted(groups.items())
    }
    if as_json:
        plan = [
            {"category": category, "action": doing, "tensors": tensors, "entries": entries, "bytes": nbytes}
            for (category, doing), (tensors, entries, nbytes) in sizes.items()
        ]
        document = {"method": job.method.name, "output": str(job.out), "bytes": job.nbytes, "plan": plan}
        document["device"] = device
        show_json({**document, "notes": job.pair.notes})
        return
    table = new_table("Category", "Action", "Tensors", "Entries", "Bytes")
    words = {
        "keep": "keep ft",
        "reset": "reset to pre",
        "prune": "prune",
        "prunerows": "prune",
        "keepsalient": "prune",
        "shrink": "drop singular values",
        "soften": "scale intruders",
        "blend": "average",
        "merge": "merge",
        "copy": "copy ft",
    }
    for (category, doing), (tensors, entries, nbytes) in sizes.items():
        table.add_row(label(category), words[doing], f"{tensors:,}", count(entries), size(nbytes))
    console = new_console()
    console.print(table)
    print_notes(console, job.pair.notes)
    console.print(f"Device: {device}.")
    console.print(f"Nothing was written. The output would be {job.out}, {size(job.nbytes)}.", soft_wrap=True)


def show_report(report: dict[str, Any], out: Path, *, nbytes: int, seconds: float, as_json: bool) -> None:
    """Print the report of a run, by category, its duration, and the path of the output."""
    if as_json:
        show_json(report)
        return
    table = new_table("Category", "Tensors", "Entries", "To pre", "Sparsity", "Effective", "D before", "D after")
    for category, group in report["categories"].items():
        if group["tensors"]:
            table.add_row(label(category), *_cells(group))
    table.add_section()
    table.add_row("all", *_cells(report["totals"]), style="bold")
    console = new_console()
    console.print(table)
    print_notes(console, report["notes"])
    console.print(f"{size(nbytes)} in {duration(seconds)}")
    console.print(f"Wrote {out}", soft_wrap=True)


def show_outstanding(part: Part, left: Outstanding, out: Path, *, as_json: bool) -> None:
    """Print that a part is done, and which others are not."""
    numbers = [other.number for other in left.parts]
    if as_json:
        show_json({"part": part.number, "parts": part.count, "bytes": left.nbytes, "outstanding": numbers})
        return
    text = f"Part {part}, {size(left.nbytes)}, is done."
    if numbers:
        named = ", ".join(map(str, numbers[:20])) + (", …" if len(numbers) > 20 else "")
        text += f" {out} appears with the last part; outstanding: {named}."
    say(text)


def _cells(group: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{group['tensors']:,}",
        count(group["entries"]),
        count(group["pruned"]),
        share(group["achieved_sparsity"], 2),
        share(group["effective_sparsity"], 2),
        fixed(group["distance_before"]),
        fixed(group["distance_after"]),
    )
