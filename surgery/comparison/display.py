"""Show a comparison on a terminal: a progress bar, then tables that fit 80 columns and need no colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells
from rich.table import Table

from surgery.display import Terminal, new_console, new_progress, new_table, print_notes, show_json
from surgery.text import MISSING, duration, number, readable, share

if TYPE_CHECKING:
    from surgery.comparison.auto import Round
    from surgery.comparison.candidates import Candidate
    from surgery.comparison.folder import Folder
    from surgery.comparison.race import Goal
    from surgery.evaluation.bench import Observe
    from surgery.evaluation.scores import Measure

# A score differs from that of ft if the p of a paired test is below this.
DIFFERENT = 0.05
LABEL = 24  # characters of a row's name
# Columns of the first table: title, key, and whether the highest value is best (None: neither is).
OUTCOME = (
    ("Kept", "retention", True),
    ("General", "average", True),
    ("Forgot", "forgetting", False),
    ("D", "distance", None),
    ("To pre", "effective_sparsity", None),
)


@contextmanager
def scoring_progress(models: int | None) -> Iterator[Observe]:
    """Show a progress bar with the model and the measure that is being scored.

    Args:
        models: how many there are, if that is known.
    """
    seen: dict[str, None] = {}
    with new_progress() as bar:
        task = bar.add_task("", total=None)

        def observe(label: str, measure: str, done: int, total: int) -> None:
            seen.setdefault(label)
            of = f"/{models}" if models else ""
            text = f"{len(seen)}{of} {label[:LABEL]}: {measure[:LABEL]}"
            bar.update(task, description=text, completed=done, total=total or None)

        yield observe


@contextmanager
def race_progress() -> Iterator[tuple[Observe, Callable[[Round | str], None]]]:
    """Show a race on standard error: a line for each round, and below them a progress bar on a terminal.

    Yields:
        What is told of the progress, and of the rounds.
    """
    with new_progress() as bar:
        task = bar.add_task("", total=None)
        told: list[Round] = []
        console = bar.console

        def observe(label: str, measure: str, done: int, total: int) -> None:
            bar.update(task, description=f"{label[:LABEL]}: {measure[:LABEL]}", completed=done, total=total or None)

        def tell(now: Round | str) -> None:
            if isinstance(now, str):
                print_notes(console, [now])
                return
            if not told:
                console.print(f"{'Round':7}{'Left':>9}{'Items':>8}  {'Ahead':{LABEL}}{'Kept':>8}{'Forgot':>9}  To go")
            told.append(now)
            left = f"{now.left} of {now.candidates}"
            console.print(
                f"{f'{now.number} of {now.of}':7}{left:>9}{now.items:>8,}  {_cut(now.leader):{LABEL}}{share(now.kept):>8}"
                f"{share(now.forgot, 2):>9}  {duration(now.seconds)}",
                soft_wrap=True,
            )

        yield observe, tell


def show_candidates(
    goal: Goal, candidates: Sequence[Candidate], measures: Sequence[Measure], notes: Sequence[str], *, as_json: bool
) -> None:
    """Show what a search would try."""
    if as_json:
        show_json(
            {
                "goal": str(goal),
                "candidates": [{"label": one.label, "commands": one.commands} for one in candidates],
                "measures": [{"name": one.name, "settings": one.settings} for one in measures],
                "notes": list(notes),
            }
        )
        return
    console = new_console()
    table = new_table("Method", "Candidates", "")
    groups: dict[str, list[str]] = {}
    for one in candidates:
        groups.setdefault(one.method or "models that are there", []).append(one.label)
    for name, labels in groups.items():
        table.add_row(name, str(len(labels)), _cut(f"{labels[0]} … {labels[-1]}" if len(labels) > 1 else labels[0], 40))
    table.add_row("all", str(len(candidates)), "")
    console.print(table)
    print_notes(console, notes)
    names = ", ".join(readable(one.name) for one in measures)
    wanted = goal if goal.limit == "knee" else f"a model that {goal}"
    console.print(f"Wanted: {wanted}. Measured: {names}; half of the items choose, half prove.")
    console.print("It would take about as long as to score one model ten times.")


def show(document: dict[str, Any], folder: Folder | None, *, as_json: bool) -> None:
    """Write a comparison to its folder, and print it.

    Raises:
        OutputError: the folder cannot be written. The comparison was printed all the same, since it may have taken hours.
    """
    written: Sequence[str] = ()
    try:
        written = folder.write(document) if folder else ()
    finally:
        _show(document, written, as_json=as_json)


def _show(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        show_json(document)
        return
    console = new_console()
    _print(console, document)
    for line in written:
        console.print(line, soft_wrap=True)


def as_text(document: dict[str, Any]) -> str:
    """Return a comparison as plain text, 80 columns wide."""
    text = io.StringIO()
    _print(Terminal(file=text, width=80, color_system=None), document)
    return text.getvalue()


def _print(console: Terminal, document: dict[str, Any]) -> None:
    console.print(_outcome(document))
    console.print("◆ no other keeps more and forgets less.  * best of its column, pre and ft aside.")
    for table in _scores(document, console.width):
        console.print(table)
    console.print(
        "± half of a 95% interval, bootstrapped over items.  ≈ a paired test cannot tell it from ft's (p > 0.05)."
    )
    if document["kind"] == "compare" and any(row["transitions"] for row in document["rows"]):
        console.print(_transitions(document))
        console.print(
            "1→0: of what pre got right, wrong now; 0→1: of what it got wrong, right. In brackets: by chance."
        )
    print_notes(console, document["notes"])
    console.print(f"{len(document['rows'])} models in {duration(document['seconds'])}")


def _outcome(document: dict[str, Any]) -> Table:
    rows = document["rows"]
    table = new_table("Model", "Task", *(title for title, _, _ in OUTCOME))
    best = {key: _best(rows, key, highest) for _, key, highest in OUTCOME if highest is not None}
    for row in rows:
        cells = []
        for _, key, highest in OUTCOME:
            text = share(row[key], 2) if key == "effective_sparsity" else number(row[key])
            marked = highest is not None and row["role"] == "other" and row[key] is not None and row[key] == best[key]
            cells.append(text + ("*" if marked else ""))
        mark = "◆ " if row["pareto"] else "  "
        table.add_row(mark + _label(row), _task(document, row), *cells, style="bold" if row["pareto"] else None)
    return table


def _task(document: dict[str, Any], row: dict[str, Any]) -> str:
    tasks = [measure["name"] for measure in document["measures"] if measure["role"] == "task"]
    return number(row["scores"][tasks[0]]["value"] if len(tasks) == 1 else row["downstream"])


def _scores(document: dict[str, Any], width: int) -> Iterator[Table]:
    """Yield tables of the scores on each measure, as many as are needed for the width."""
    rows, measures = document["rows"], document["measures"]
    labels = max(cell_len(text) for text in ("Model", *map(_label, rows)))
    cells = {measure["name"]: [_score(row, measure["name"]) for row in rows] for measure in measures}
    while measures:
        taken: list[dict[str, Any]] = []
        room = width - labels - 2
        for measure in measures:
            name = readable(measure["name"])
            words = max(map(cell_len, name.split()), default=0) if " " in name else 0
            needed = 2 + max(*(len(cell) for cell in cells[measure["name"]]), min(words or 16, cell_len(name)))
            if taken and needed > room:
                break
            taken.append(measure)
            room -= needed
        measures = measures[len(taken) :]
        table = new_table("Model")
        for measure in taken:
            table.add_column(readable(measure["name"]), justify="right", overflow="fold")
        for place, row in enumerate(rows):
            table.add_row(_label(row), *(cells[measure["name"]][place] for measure in taken))
        yield table


def _transitions(document: dict[str, Any]) -> Table:
    table = new_table("Model", "Measure", "1→0", "0→1")
    for row in document["rows"]:
        for position, (name, found) in enumerate(row["transitions"].items()):
            turned = (f"{share(found[key])} ({share(found[f'{key}_by_chance'])})" for key in ("lost", "gained"))
            table.add_row("" if position else _label(row), _cut(name), *turned)
    return table


def _score(row: dict[str, Any], name: str) -> str:
    found = row["scores"][name]
    if found["value"] is None:
        return MISSING
    half = None if None in (found["low"], found["high"]) else (found["high"] - found["low"]) / 2
    same = found["p"] is not None and found["p"] >= DIFFERENT
    return f"{number(found['value'])} ±{number(half)}{'≈' if same else ''}"


def _best(rows: Sequence[dict[str, Any]], key: str, highest: bool) -> float | None:
    values = [row[key] for row in rows if row["role"] == "other" and row[key] is not None]
    return None if len(values) < 2 else max(values) if highest else min(values)


def _label(row: dict[str, Any]) -> str:
    return _cut(row["label"])


def _cut(label: str, most: int = LABEL) -> str:
    text = readable(label)
    return text if cell_len(text) <= most else f"{chop_cells(text, most - 1)[0]}…"
