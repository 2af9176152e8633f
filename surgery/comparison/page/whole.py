"""The HTML page of `surgery compare` and `surgery sweep`: one file that needs no network.

It can be read without JavaScript; the script only sorts the table, shows tooltips and copies commands. Names, labels and
commands come from files and may hold anything: they are escaped as text, and a Content-Security-Policy lets nothing run or style
the page but its own script and style sheet, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from surgery.comparison.charts import curve_charts, pareto_chart, tip
from surgery.comparison.page.drawing import drawing
from surgery.comparison.page.search import claim, race_table
from surgery.comparison.page.table import table
from surgery.comparison.plot import curves, pareto, race, skills
from surgery.comparison.text import html, listed
from surgery.option import with_flags
from surgery.pictures import DARK, LIGHT
from surgery.text import duration, finite, number, readable, share, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"
# Width of a picture in inches, and the most rows of a panel of bars.
WIDE, MOST = 9.0, 20
TITLES = {
    "compare": ("Comparison", "Comparison of checkpoints"),
    "sweep": ("Sweep", "Sweep of settings"),
    "auto": ("Search", "Search for the best model"),
}
CAPTIONS = {
    "race": "Forgetting against retention of all candidates of the search, where the race left them",
    "pareto": "Forgetting against retention of the task score",
    "curves": "Downstream and general score against the setting of each method",
    "skills": "The score of each row on each measure",
}
KINDS = {
    "share": "share, higher is better",
    "loss": "nats per token, lower is better",
    "perplexity": "lower is better",
    "divergence": "nats per token from pre, lower is better",
}


def page(document: dict[str, Any]) -> bytes:
    """Return the page of a comparison.

    Args:
        document: the content of results.json.

    Returns:
        HTML in UTF-8.
    """
    style, script = (
        Template(_asset("page.css")).substitute(light=_colours(LIGHT), dark=_colours(DARK)),
        _asset("page.js"),
    )
    ft, pre = _model(document["ft"]), _model(document["pre"])
    title, heading = TITLES[document["kind"]]
    text = Template(_asset("page.html")).substitute(
        policy=POLICY.format(script=_hash(script), style=_hash(style)),
        title=f"{title}: {ft}",
        heading=heading,
        ft=ft,
        pre=pre,
        summary=_summary(document),
        table=table(document),
        pareto=_figure(document, "pareto", pareto(document, WIDE)),
        claim=claim(document) if "auto" in document else "",
        race=_race(document) if "auto" in document else "",
        curves=_figure(document, "curves", curves(document)) if curve_charts(document) else "",
        skills=_figure(document, "skills", skills(document, MOST, WIDE)),
        most=_most(document),
        measures=_measures(document),
        commands=_commands(document),
        versions="".join(f"<dt>{html(name)}</dt><dd>{html(held)}</dd>" for name, held in document["versions"].items()),
        notes=_notes(document),
        seconds=duration(document["seconds"]),
        style=style,
        script=script,
    )
    return text.encode()


def _summary(document: dict[str, Any]) -> str:
    if "auto" in document:
        return html(document["auto"]["sentence"])
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


def _race(document: dict[str, Any]) -> str:
    figure = _figure(document, "race", race(document, WIDE))
    return (
        '<section aria-labelledby="race-title"><h2 id="race-title">The race</h2>\n<p>All candidates on the half of the items '
        "that was for choosing, where each fell out: the paler, the fewer items it saw. The dashed line is the limit; finalists "
        f"have a dark edge.</p>\n{figure}\n{race_table(document)}</section>"
    )


def _model(side: dict[str, Any]) -> str:
    return html(side["repo"] or side["typed"])


def _figure(document: dict[str, Any], name: str, figure: Figure) -> str:
    """Return a picture in its frame, with a sentence about the rows that it lacks."""
    titles = {
        index: "\n".join(
            [
                f"{readable(row['label'])}{' · Pareto-optimal' if row['pareto'] else ''}",
                *(f"{what}: {value}" for what, value in tip(document, row)),
            ]
        )
        for index, row in enumerate(document["rows"])
    }
    charts = {
        "pareto": [pareto_chart(document)],
        "curves": [chart for held in curve_charts(document) for chart in held],
    }
    missing = list(dict.fromkeys(html(label) for chart in charts.get(name, []) for label in chart["missing"]))
    hint = f'<p class="hint">Not drawn, for want of finite numbers: {", ".join(missing)}.</p>' if missing else ""
    return (
        f'<figure class="chart {name}"><div class="drawing">{drawing(figure, name, CAPTIONS[name], titles)}</div>'
        f"{hint}</figure>"
    )


def _colours(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


def _most(document: dict[str, Any]) -> str:
    count = len(document["rows"])
    return (
        f" Shown are {MOST} of {count} rows: pre, ft, Pareto-optimal ones, and others evenly." if count > MOST else ""
    )


def _measures(document: dict[str, Any]) -> str:
    lines = []
    for measure in document["measures"]:
        settings = " · ".join(
            f"{key.replace('_', ' ')} {', '.join(map(str, held)) if isinstance(held, list) else held}"
            for key, held in measure["settings"].items()
            if key != "each"  # of a group's members: results.json has it
        )
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
    lines = "".join(f"<li>{html(with_flags(note))}</li>" for note in document["notes"])
    return f'<section><h2>Notes</h2>\n<ul class="notes">{lines}</ul></section>'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return (files("surgery.comparison.page") / name).read_text(encoding="utf-8")
