"""Per-skill bars as HTML: drawn in percent of their cell, so that they need neither a script nor a style of their own."""

from __future__ import annotations

from typing import Any

from surgery.comparison.charts import bars
from surgery.comparison.text import html, score

MOST = 20


def skills(document: dict[str, Any]) -> str:
    """A figure per measure, with a bar per row: those that `charts.chosen` takes where there are more than 20."""
    return "\n".join(_figure(group) for group in bars(document, MOST))


def _figure(group: dict[str, Any]) -> str:
    better = "higher is better" if group["higher"] else "lower is better"
    role = "task" if group["role"] == "task" else "general"
    lines = "\n".join(_bar(bar, group["kind"], group["limit"]) for bar in group["bars"])
    return (
        f'<figure class="skill"><figcaption>{html(group["name"])} <small>{role} · {better}</small></figcaption>\n'
        f"<table><tbody>\n{lines}\n</tbody></table></figure>"
    )


def _bar(bar: dict[str, Any], kind: str, limit: float) -> str:
    label, value = html(bar["label"]), bar["value"]
    drawn = ""
    if value is not None:
        colour = bar["role"] if bar["series"] is None else f"s{bar['series'] % 6}"
        drawn = f'<rect class="bar {colour}" x="0" y="3" width="{_percent(value, limit)}" height="10" rx="2"/>'
        if bar["low"] is not None and bar["high"] is not None:
            ends = f'x1="{_percent(bar["low"], limit)}" x2="{_percent(bar["high"], limit)}"'
            drawn += f'<line class="whisker" {ends} y1="8" y2="8"/>'
    cut = ' <span title="the bar is cut">▸</span>' if value is not None and value > limit * 1.0001 else ""
    return (
        f'<tr class="{bar["role"]}"><th scope="row" title="{label}">{label}</th>'
        f'<td class="track"><svg width="100%" height="16" aria-hidden="true">{drawn}</svg></td>'
        f"<td>{html(score(kind, value))}{cut}</td></tr>"
    )


def _percent(value: float, limit: float) -> str:
    return f"{100 * min(max(value / limit, 0.0), 1.0):.2f}%"
