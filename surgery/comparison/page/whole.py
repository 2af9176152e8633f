"""The HTML page of `surgery compare` and `surgery sweep`: one file that opens from disk and asks nothing of a network.

Names, labels and commands come from files and may hold anything. They are escaped as text; the numbers for the pictures stand in
a block of JSON without a `<`; and a Content-Security-Policy lets nothing run or style the page but its own script and style
sheet, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from surgery.comparison.charts import curve_charts, pareto_chart, series
from surgery.comparison.page.bars import MOST, skills
from surgery.comparison.page.table import table
from surgery.comparison.text import html, listed
from surgery.text import finite, number, share, words

POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"
KINDS = {"share": "share, higher is better", "loss": "nats per token, lower is better", "perplexity": "lower is better"}


def page(document: dict[str, Any]) -> bytes:
    """The page of what results.json holds.

    Args:
        document: kind "compare" or "sweep", measures, rows, commands and versions; a float may be None.

    Returns:
        HTML in UTF-8.
    """
    curves = curve_charts(document)
    data = {
        "series": [{"name": group.name, "rows": group.rows} for group in series(document)],
        "charts": [pareto_chart(document), *(chart for charts in curves for chart in charts)],
    }
    style, script = _asset("page.css"), _asset("page.js")
    ft, pre = _model(document["ft"]), _model(document["pre"])
    title = "Sweep" if document["kind"] == "sweep" else "Comparison"
    text = Template(_asset("page.html")).substitute(
        policy=POLICY.format(script=_hash(script), style=_hash(style)),
        title=f"{title}: {ft}",
        heading=f"{title} of checkpoints" if title == "Comparison" else "Sweep of settings",
        ft=ft,
        pre=pre,
        summary=_summary(document),
        table=table(document),
        curves="\n".join(f'<div class="pair">{"".join(map(_place, charts))}</div>' for charts in curves),
        skills=skills(document),
        most=_most(document),
        measures=_measures(document),
        commands=_commands(document),
        versions="".join(f"<dt>{html(name)}</dt><dd>{html(held)}</dd>" for name, held in document["versions"].items()),
        notes=_notes(document),
        seconds=_seconds(document["seconds"]),
        data=json.dumps(data, allow_nan=False).replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"),
        style=style,
        script=script,
    )
    return text.encode()


def _summary(document: dict[str, Any]) -> str:
    rows = document["rows"]
    others = [row for row in rows if row["role"] == "other"]
    optimal = [row for row in others if row["pareto"]]
    counted = (
        f"{len(others)} {'setting' if document['kind'] == 'sweep' else 'checkpoint'}{'' if len(others) == 1 else 's'}"
    )
    if not others:
        return "Only pre and ft were measured."
    if not optimal:
        return f"Of {counted}, none is Pareto-optimal: each is beaten on both axes by another row."
    names = listed([f"<strong>{html(row['label'])}</strong>" for row in optimal])
    first = (
        f"Of {counted}, {len(optimal)} {'is' if len(optimal) == 1 else 'are'} Pareto-optimal, so that no other keeps more of the "
        f"task score and forgets less: {names}."
    )
    known = [row for row in optimal if finite(row["retention"]) is not None and finite(row["forgetting"]) is not None]
    if len(known) < 2:
        return first
    keeps, spares = max(known, key=lambda row: row["retention"]), min(known, key=lambda row: row["forgetting"])
    if keeps is spares:
        return first
    lost = next((row["forgetting"] for row in rows if row["role"] == "ft"), None)
    return (
        f"{first} Among them, {html(keeps['label'])} keeps the most, {share(keeps['retention'])} at a forgetting of "
        f"{number(keeps['forgetting'])}, and {html(spares['label'])} forgets the least, {number(spares['forgetting'])} at "
        f"{share(spares['retention'])}; ft's own forgetting is {number(lost)}."
    )


def _model(side: dict[str, Any]) -> str:
    return html(side["repo"] or side["typed"])


def _place(chart: dict[str, Any]) -> str:
    return (
        f'<figure class="chart" data-chart="{html(chart["name"])}"><figcaption>{html(chart["title"])}</figcaption>'
        '<div class="drawing"></div></figure>'
    )


def _most(document: dict[str, Any]) -> str:
    count = len(document["rows"])
    return (
        f" Shown are {MOST} of {count} rows: pre, ft, Pareto-optimal ones, and others evenly." if count > MOST else ""
    )


def _measures(document: dict[str, Any]) -> str:
    lines = []
    for measure in document["measures"]:
        settings = " · ".join(f"{key.replace('_', ' ')} {held}" for key, held in measure["settings"].items())
        lines.append(
            f"<tr><th scope='row'>{html(measure['name'])}</th><td>{html(measure['role'])}</td>"
            f"<td>{html(KINDS[measure['kind']])}</td><td>{measure['items']:,}</td><td>{html(settings)}</td></tr>"
        )
    return "\n".join(lines)


def _commands(document: dict[str, Any]) -> str:
    made = [row for row in document["rows"] if row["command"]]
    text = _command(document["command"])
    if made:
        lines = "\n".join(f"<h3>{html(row['label'])}</h3>\n{_command(row['command'])}" for row in made)
        text += f"\n<details><summary>How {len(made)} of the checkpoints were made</summary>\n{lines}\n</details>"
    return text


def _command(command: list[str]) -> str:
    # No `html` here: it would change the line breaks of a quoted argument.
    shown = words(command).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    button = '<button type="button" class="copy" hidden>Copy</button>'
    return f'<div class="command"><pre tabindex="0"><code>{shown}</code></pre>{button}</div>'


def _notes(document: dict[str, Any]) -> str:
    if not document["notes"]:
        return ""
    lines = "".join(f"<li>{html(note)}</li>" for note in document["notes"])
    return f'<section><h2>Notes</h2>\n<ul class="notes">{lines}</ul></section>'


def _seconds(seconds: Any) -> str:
    found = finite(seconds) or 0.0
    return (
        f"{found:.0f} seconds"
        if found < 120
        else f"{found / 60:.0f} minutes"
        if found < 7200
        else f"{found / 3600:.1f} hours"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return (files("surgery.comparison.page") / name).read_text(encoding="utf-8")
