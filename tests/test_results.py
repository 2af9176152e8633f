"""The tables of docs/results.md are those of the files that its commands wrote."""

from __future__ import annotations

import csv
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "results.md").read_text()


def test_what_a_search_found_on_a_real_pair_is_what_the_script_wrote() -> None:
    rows = list(csv.DictReader((DOCS / "results" / "fresh.csv").open()))
    shown = TEXT.partition("## What `surgery auto` finds on a real pair")[2].partition("\n## ")[0]
    lines = {" ".join(line.replace("◆", "").replace("*", "").split()) for line in shown.splitlines()}
    for row in rows:
        kept, average, forgot = (
            f"{float(row[name]):.3f}".replace("-", "−") for name in ("retention", "average", "forgetting")
        )
        line = f"{row['label']} {float(row['gsm8k: value']):.3f} {kept} {average} {forgot}"
        assert any(found.startswith(line) for found in lines), line


def test_the_correlations_are_those_that_the_script_wrote() -> None:
    for row in csv.DictReader((DOCS / "results" / "rank.csv").open()):
        assert f"| {row['measure']} | {row['spearman']} ({row['low']} to {row['high']}) |" in TEXT
