"""Compute the data of a comparison's pictures, which `surgery.comparison.plot` draws.

A chart is a dict that JSON can hold:

    title               of curves: the words above them
    x, y                {"label", "percent": in percent, "flip": small values on the far side}
    points              {"series", "role", "row", "label", "pareto", "x": [value, low, high], "y": [value, low, high],
                        "rank": which names come first where room is short: 3 pre and ft, 2 Pareto-optimal, 1 the end of a line}
    lines               {"series", "points": [[x, y, low, high], …]} in the order in which they are joined
    front               [[x, y], …] of the Pareto-optimal rows by x; none is better than these on both axes
    levels              {"name", "y"}: where pre and ft are
    missing             labels of the rows that lack a finite number
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from surgery.comparison.grid import axis_of
from surgery.comparison.text import interval, score
from surgery.methods import METHODS
from surgery.methods.method import main_option
from surgery.text import finite, number, readable, share

Document = dict[str, Any]
Row = dict[str, Any]
# Parameter that a sweep varies -> label of its axis.
AXES = {main_option(kind).name: axis_of(kind) for kind in METHODS.values()}
# Where lower is better, bars are cut at this many times the median: the perplexity of a broken model has no bound.
CUT = 3.0


@dataclass(frozen=True)
class Series:
    """Rows of one method whose parameters differ only along one axis and in the seed, or a single row without an axis.

    Attributes:
        name: the method, with the parameters that distinguish it from its other series; for a single row, its label.
        axis: a key of AXES, or None.
        rows: indices into the document's rows, sorted by the value on the axis.
        at: that value of each row; the mean of several ratios.
    """

    name: str
    axis: str | None
    rows: list[int]
    at: list[float]

    @property
    def joined(self) -> bool:
        """Whether a line may join the rows: there are several, and no two have the same value on the axis."""
        return len(self.rows) > 1 and len(set(self.at)) == len(self.at)


def series(document: Document) -> list[Series]:
    """Group all rows except pre and ft by method, in the order of the document."""
    groups: dict[tuple[str, str | None, str], list[tuple[float, int]]] = {}
    for index, row in enumerate(document["rows"]):
        if row["role"] != "other":
            continue
        axis, at, rest = _settings(row)
        key = (row["method"], axis, rest) if row["method"] and axis else ("", None, str(index))
        groups.setdefault(key, []).append((at, index))
    found = []
    for (method, axis, rest), members in groups.items():
        members.sort()
        rows = [index for _, index in members]
        others = [other for name, _, other in groups if name == method and other != rest]
        name = _named(method, rest, others) if len(rows) > 1 else document["rows"][rows[0]]["label"]
        found.append(Series(readable(name), axis, rows, [value for value, _ in members]))
    return found


def pareto_chart(document: Document) -> dict[str, Any]:
    """Return the chart of retention against forgetting, on which up and to the right is better."""
    rows, groups = document["rows"], series(document)
    of = {row: index for index, group in enumerate(groups) for row in group.rows}
    ends = {row for group in groups if group.joined for row in (group.rows[0], group.rows[-1])}
    points = []
    for index, row in enumerate(rows):
        x, y = _spread(row, "retention"), _spread(row, "forgetting")
        if x[0] is not None and y[0] is not None:
            rank = 3 if row["role"] != "other" else 2 if row["pareto"] else int(index in ends)
            points.append(_point(document, index, of.get(index), x, y) | {"rank": rank})
    drawn = {point["row"]: point for point in points}
    lines = [
        {"series": index, "points": [[drawn[row]["x"][0], drawn[row]["y"][0], None, None] for row in group.rows]}
        for index, group in enumerate(groups)
        if group.joined and all(row in drawn for row in group.rows)
    ]
    front = sorted([point["x"][0], point["y"][0]] for point in points if point["pareto"])
    return {
        "x": {"label": "retention of ft's task score", "percent": True, "flip": False},
        "y": {"label": "forgetting (less is better)", "percent": False, "flip": True},
        "points": points,
        "lines": lines,
        "front": front,
        "levels": [],
        "missing": [readable(row["label"]) for index, row in enumerate(rows) if index not in drawn],
    }


def curve_charts(document: Document) -> list[list[dict[str, Any]]]:
    """Return two charts for each axis of a sweep: the downstream and the general score (FAPM paper, Figures 2 and 5).

    Rows with the same value on the axis (other seeds, ratios of the same mean) are points; the line joins their means.
    """
    if document["kind"] != "sweep":
        return []
    rows, groups = document["rows"], series(document)
    swept = [axis for axis in AXES if any(group.axis == axis and len(set(group.at)) > 1 for group in groups)]
    whole = all(measure["kind"] == "share" for measure in document["measures"] if measure["role"] == "task")
    ft = next((finite(row["downstream"]) for row in rows if row["role"] == "ft"), None)
    pre = next((finite(row["average"]) for row in rows if row["role"] == "pre"), None)

    def downstream(row: Row) -> list[float | None]:
        _, low, high = _spread(row, "retention")
        bounds = [None if ft is None or end is None else end * ft for end in (low, high)]
        return [finite(row["downstream"]), *bounds]

    def general(row: Row) -> list[float | None]:
        _, low, high = _spread(row, "forgetting")
        bounds = [None if pre is None or end is None else pre - end for end in (high, low)]
        return [finite(row["average"]), *bounds]

    tasks = [readable(measure["name"]) for measure in document["measures"] if measure["role"] == "task"]
    panels = (
        (f"Downstream: {', '.join(tasks)}", "downstream score", whole, downstream),
        ("General ability", "mean general score", False, general),
    )
    return [
        [
            {
                "title": title,
                "x": {"label": AXES[axis], "percent": False, "flip": False},
                "y": {"label": label, "percent": percent, "flip": False},
                **_curves(document, groups, axis, value),
                "front": [],
                "levels": [
                    {"name": row["role"], "y": value(row)[0]}
                    for row in rows
                    if row["role"] in ("pre", "ft") and value(row)[0] is not None
                ],
            }
            for title, label, percent, value in panels
        ]
        for axis in swept
    ]


def race_chart(document: Document) -> dict[str, Any]:
    """Return the chart of a search: where each candidate stood on the last items that it saw.

    Returns:
        A chart whose points are {"series", "label", "at": [retention, forgetting], "seen": share of the items of the race,
        "finalist", "winner"}, whose axes have a "limit" (None where there is none), with "names" of the series.
    """
    found, goal = document["auto"], document["auto"]["goal"]
    drawn = [one for one in found["candidates"] if None not in (one["retention"], one["forgetting"])]
    names = list(dict.fromkeys(one["method"] or "existing models" for one in drawn))
    last, most = (max((one[key] for one in drawn), default=1) for key in ("round", "items"))
    bound = goal["bound"]
    return {
        "x": {"label": "retention of ft's task score", "percent": True, "flip": False}
        | {"limit": bound if goal["limit"] == "retention" else None},
        "y": {"label": "forgetting (less is better)", "percent": False, "flip": True}
        | {"limit": bound if goal["limit"] == "forgetting" else None},
        "points": [
            {
                "series": names.index(one["method"] or "existing models"),
                "label": readable(one["label"]),
                "at": [one["retention"], one["forgetting"]],
                "seen": one["items"] / most,
                "finalist": one["round"] == last,
                "winner": one["label"] == found["winner"],
            }
            for one in drawn
        ],
        "names": names,
    }


def bars(document: Document, most: int) -> list[dict[str, Any]]:
    """Return the bars of each measure, one for each of the same rows, of which there are at most `most`.

    Returns:
        {"name", "role", "kind", "higher", "limit": where the scale ends, "bars": [{"row", "label", "role", "series", "value",
        "low", "high"}, …]}.
    """
    of = {row: index for index, group in enumerate(series(document)) for row in group.rows}
    shown = chosen(document, most)
    groups = []
    for measure in document["measures"]:
        held = []
        for index in shown:
            row = document["rows"][index]
            found = row["scores"].get(measure["name"]) or {}
            held.append(
                {"row": index, "label": readable(row["label"]), "role": row["role"], "series": of.get(index)}
                | {key: finite(found.get(key)) for key in ("value", "low", "high")}
            )
        higher = measure["kind"] == "share"
        limit = _limit([bar["value"] for bar in held], [bar["high"] for bar in held], higher)
        groups.append(
            {"name": readable(measure["name"]), "role": measure["role"], "kind": measure["kind"]}
            | {"higher": higher, "limit": limit, "bars": held}
        )
    return groups


def chosen(document: Document, most: int) -> list[int]:
    """Choose at most `most` rows, in the document's order: pre, ft, then Pareto-optimal rows, then others, evenly spaced."""
    rows = document["rows"]
    ends = [index for index, row in enumerate(rows) if row["role"] != "other"]
    best = [index for index, row in enumerate(rows) if row["role"] == "other" and row["pareto"]]
    rest = [index for index, row in enumerate(rows) if row["role"] == "other" and not row["pareto"]]
    kept = [*ends, *_evenly(best, most - len(ends))]
    return sorted([*kept, *_evenly(rest, most - len(kept))])


def tip(document: Document, row: Row) -> list[list[str]]:
    """Return the lines that a tooltip shows of a row below its name: [name of a number, the number as text]."""
    said = []
    for measure in document["measures"]:
        found = row["scores"].get(measure["name"])
        if found:
            ends = interval(measure["kind"], found["low"], found["high"])
            value = score(measure["kind"], found["value"])
            said.append([readable(measure["name"]), f"{value} ({ends})" if ends else value])
    said.append(["retention", share(row["retention"])])
    said.append(["forgetting", number(row["forgetting"])])
    for key in (*AXES, "seed"):
        held = (row["parameters"] or {}).get(key)
        if held is not None:
            said.append([key.replace("_", " "), readable(setting(held))])
    return said


def setting(value: Any) -> str:
    """Return a parameter as text."""
    return ", ".join(map(setting, value)) if isinstance(value, list) else str(value)


def _point(document: Document, index: int, group: int | None, x: list[Any], y: list[Any]) -> dict[str, Any]:
    row = document["rows"][index]
    return {
        "series": group,
        "role": row["role"],
        "row": index,
        "label": readable(row["label"]),
        "pareto": bool(row["pareto"]),
        "x": x,
        "y": y,
    }


def _curves(document: Document, groups: Sequence[Series], axis: str, value: Any) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    missing: list[str] = []
    for index, group in enumerate(groups):
        if group.axis != axis:
            continue
        joined: dict[float, list[list[float | None]]] = {}
        for row, at in zip(group.rows, group.at, strict=True):
            found = value(document["rows"][row])
            if found[0] is None:
                missing.append(readable(document["rows"][row]["label"]))
                continue
            joined.setdefault(at, []).append(found)
            points.append(_point(document, row, index, [at, None, None], found) | {"rank": 0})
        means = [[at, *map(_mean, zip(*held, strict=True))] for at, held in joined.items()]
        if len(means) > 1:
            lines.append({"series": index, "points": means})
    return {"points": points, "lines": lines, "missing": missing}


def _settings(row: Row) -> tuple[str | None, float, str]:
    """Return the axis among a row's parameters, the value on it, and the other parameters without the seed, as JSON."""
    held = dict(row["parameters"] or {})
    held.pop("seed", None)
    for axis in AXES:
        value = held.get(axis)
        numbers = [finite(part) for part in (value if isinstance(value, list) else [value])]
        found = [part for part in numbers if part is not None]
        if found and len(found) == len(numbers):
            del held[axis]
            return axis, fmean(found), json.dumps(held, sort_keys=True)
    return None, 0.0, ""


def _named(method: str, rest: str, others: Iterable[str]) -> str:
    """Return the method's name with the parameters in which this series differs from its others."""
    mine, theirs = json.loads(rest), [json.loads(other) for other in others]
    apart = [key for key in mine if any(other.get(key) != mine[key] for other in theirs)]
    return f"{method} ({', '.join(f'{key} {setting(mine[key])}' for key in apart)})" if apart else method


def _spread(row: Row, name: str) -> list[float | None]:
    return [finite(row[name]), finite(row[f"{name}_low"]), finite(row[f"{name}_high"])]


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return fmean(held) if len(held) == len(values) else None


def _evenly(items: list[int], count: int) -> list[int]:
    """Return `count` of the items, evenly spaced, both ends among them."""
    if count >= len(items):
        return items
    return [items[round(part * (len(items) - 1) / max(count - 1, 1))] for part in range(max(count, 0))]


def _limit(values: Sequence[float | None], highs: Sequence[float | None], higher: bool) -> float:
    known = sorted(value for value in values if value is not None)
    if not known:
        return 1.0
    largest = max([*known, *(high for high in highs if high is not None)])
    if not higher:
        largest = min(largest, CUT * max(known[len(known) // 2], 0.0))
    return largest if largest > 0 else 1.0
