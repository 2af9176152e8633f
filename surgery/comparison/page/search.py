"""The part of the page about a search: the claim with its tests, and what became of each candidate."""

from __future__ import annotations

from typing import Any

from surgery.comparison.text import html
from surgery.text import number, share, words


def claim(document: dict[str, Any]) -> str:
    """Return the tests of the limit and the commands of the winner as a section; nothing where there are neither."""
    found = document["auto"]
    parts = []
    level = share(found["level"], 0)
    if found["tests"]:
        tests = "; ".join(f"{html(test['label'])} p = {test['p']:.2g}" for test in found["tests"])
        parts.append(
            "<p>The limit was tested on the half of the items that nothing was chosen on, in an order that the other half had "
            f"fixed, the safest first, up to the first that failed at {level}: {tests}. With a chance of at most {level}, one of "
            "those that passed is beyond the limit.</p>"
        )
    if found["commands"]:
        lines = "\n".join(html(words(command)) for command in found["commands"])
        parts.append(
            f'<h3>Without the search</h3><div class="command"><pre tabindex="0"><code>{lines}</code></pre></div>'
        )
    if not parts:
        return ""
    return f'<section aria-labelledby="claim-title"><h2 id="claim-title">The claim</h2>\n{"".join(parts)}</section>'


def race_table(document: dict[str, Any]) -> str:
    """Return the candidates as a table, those that came furthest first, with why each fell out."""
    order = sorted(document["auto"]["candidates"], key=lambda one: (-one["round"], -one["items"]))
    lines = "\n".join(
        f"<tr><th scope='row'>{html(one['label'])}</th><td>{one['round']}</td><td>{one['items']:,}</td>"
        f"<td>{share(one['retention'])}</td><td>{number(one['forgetting'])}</td><td>{html(one['why'] or 'finalist')}</td></tr>"
        for one in order
    )
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("Candidate", "Rounds", "Items", "Kept", "Forgot", "Fell out")
    )
    return (
        f"<details><summary>What became of each of the {len(order)}</summary>"
        '<div class="scroll" role="region" aria-label="Candidates" tabindex="0"><table class="measures">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div></details>"
    )
