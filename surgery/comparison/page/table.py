"""The table of the page, a row for each checkpoint. page.js makes it sortable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.comparison.charts import AXES, setting
from surgery.comparison.text import html, interval, score, stars
from surgery.text import MISSING, finite, number, share

ROLES = {"pre": "pre-trained", "ft": "fine-tuned"}


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        title: the head of the column.
        better: "high", "low", or "" if neither is.
        value: returns the number of a row.
        show: formats it.
        ends: returns its interval as text; empty without one.
        p: returns the p of the paired test against ft, or None.
    """

    title: str
    better: str
    value: Callable[[dict[str, Any]], float | None]
    show: Callable[[Any], str]
    ends: Callable[[dict[str, Any]], str] = lambda row: ""
    p: Callable[[dict[str, Any]], Any] = lambda row: None


def table(document: dict[str, Any]) -> str:
    """Return the table as HTML."""
    columns, rows = _columns(document), document["rows"]
    best = [_best(column, rows) for column in columns]
    heads = [_head("Checkpoint", "name", "text")] + [_head(column.title, column.better, "number") for column in columns]
    body = "\n".join(_line(index, row, columns, best) for index, row in enumerate(rows))
    return f"<table>\n<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _columns(document: dict[str, Any]) -> list[Column]:
    measures = {
        role: [_measured(measure) for measure in document["measures"] if measure["role"] == role]
        for role in ("task", "general")
    }
    columns = measures["task"]
    if len(columns) > 1:
        columns.append(_plain("downstream", "Task mean", "high", number))
    columns.append(_bounded("retention", "Retention", "high", share, "share"))
    columns += measures["general"]
    columns.append(_plain("average", "General mean", "high", number))
    columns.append(_bounded("forgetting", "Forgetting", "low", number, "loss"))
    columns.append(_plain("distance", "Distance D", "", number))
    columns.append(_plain("effective_sparsity", "Entries as in pre", "", share))
    return [column for column in columns if any(column.value(row) is not None for row in document["rows"])]


def _measured(measure: dict[str, Any]) -> Column:
    name, kind = measure["name"], measure["kind"]

    def found(row: dict[str, Any], key: str) -> Any:
        return (row["scores"].get(name) or {}).get(key)

    return Column(
        name,
        "high" if kind == "share" else "low",
        lambda row: finite(found(row, "value")),
        lambda value: score(kind, value),
        lambda row: interval(kind, found(row, "low"), found(row, "high")),
        lambda row: found(row, "p"),
    )


def _plain(key: str, title: str, better: str, show: Callable[[Any], str]) -> Column:
    return Column(title, better, lambda row: finite(row[key]), show)


def _bounded(key: str, title: str, better: str, show: Callable[[Any], str], kind: str) -> Column:
    return Column(
        title,
        better,
        lambda row: finite(row[key]),
        show,
        lambda row: interval(kind, row[f"{key}_low"], row[f"{key}_high"]),
    )


def _best(column: Column, rows: list[dict[str, Any]]) -> float | None:
    """Return the best value of all rows except pre and ft, or None."""
    values = [column.value(row) for row in rows if row["role"] == "other"]
    known = [value for value in values if value is not None]
    if not known or not column.better:
        return None
    return max(known) if column.better == "high" else min(known)


def _head(title: str, better: str, kind: str) -> str:
    arrow = {"high": "↑", "low": "↓"}.get(better, "")
    said = {"high": "higher is better", "low": "lower is better"}.get(better, "")
    mark = f' <span class="better" title="{said}" aria-label="{said}">{arrow}</span>' if arrow else ""
    return (
        f'<th scope="col" class="{kind}" data-better="{better}" aria-sort="none">'
        f'<button type="button">{html(title)}{mark}<span class="order" aria-hidden="true"></span></button></th>'
    )


def _line(index: int, row: dict[str, Any], columns: list[Column], best: list[float | None]) -> str:
    made = " · ".join(_made(row))
    marks = f' <span class="pill role">{ROLES[row["role"]]}</span>' if row["role"] in ROLES else ""
    marks += ' <span class="pill">Pareto</span>' if row["pareto"] else ""
    small = f"<small>{html(made)}</small>" if made else ""
    label = html(row["label"])
    cells = [f'<th scope="row" data-value="{label}"><span class="name">{label}</span>{marks}{small}</th>']
    for column, top in zip(columns, best, strict=True):
        value = column.value(row)
        if value is None:
            cells.append(f'<td data-value="">{MISSING}</td>')
            continue
        shown, ends, p = html(column.show(value)), column.ends(row), column.p(row)
        if top is not None and value == top and row["role"] == "other":
            shown = f'<b title="best of the checkpoints">{shown}</b>'
        mark = f'<sup title="p = {html(number(p))} against ft">{stars(p)}</sup>' if stars(p) else ""
        low = f"<small>{html(ends)}</small>" if ends else ""
        cells.append(f'<td data-value="{value!r}">{shown}{mark}{low}</td>')
    kind = "pareto " if row["pareto"] else ""
    return f'<tr class="{kind}{row["role"]}" id="row-{index}">{"".join(cells)}</tr>'


def _made(row: dict[str, Any]) -> list[str]:
    """Return the method and the parameters that a sweep varies, as texts."""
    held = row["parameters"] or {}
    swept = [f"{key.replace('_', ' ')} {setting(held[key])}" for key in (*AXES, "seed") if held.get(key) is not None]
    return [*([row["method"]] if row["method"] else []), *swept]
