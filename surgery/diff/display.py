"""The tables of `surgery diff`, which fit 80 columns, with bars that need no colour."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from surgery.diff.quantiles import QUANTILES
from surgery.display import meter, new_console, new_table, print_notes, show_json
from surgery.text import brief, count, fixed, label, share

BAR = 8  # characters of a bar


def show_diff(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    """Print the measurements by category and by layer, then a line for each file that was written."""
    if as_json:
        show_json(document)
        return
    console = new_console()
    groups = {label(name): group for name, group in document["categories"].items()} | {"all": document["totals"]}
    edited = document["totals"]["remaining"] is not None
    _print(console, _head("Category", edited), [_row(name, group, groups, edited) for name, group in groups.items()])
    _print(console, ["|Δ|", *_quantile_names()], [_quantiles(name, group["delta"]) for name, group in groups.items()])
    ratios = [[*_quantiles(name, group["ratio"]), _infinite(group)] for name, group in groups.items()]
    _print(console, ["|Δ| / |W|", *_quantile_names(), "∞"], ratios)
    pruned = {name: group["fapm_same"] for name, group in groups.items() if group["fapm_same"]["stop"] is not None}
    if pruned:
        _print(console, ["FAPM is the same", "from", "to"], [[name, *_from_to(same)] for name, same in pruned.items()])
    stacks = dict.fromkeys(group["stack"] for group in document["layers"])
    for stack in stacks:
        layers = {str(group["layer"]): group for group in document["layers"] if group["stack"] == stack}
        title = ["Layer", "Unchanged", "‖Δ‖/‖W‖", ""]
        title += ["|Δ| 99%", "|Δ|/|W| 99%", "Left"] if edited else ["|Δ| 50%", "99%", "|Δ|/|W| 50%", "99%"]
        if len(stacks) > 1:
            console.print(stack, soft_wrap=True)
        _print(console, title, [_layer(name, group, layers, edited) for name, group in layers.items()], total=False)
    print_notes(console, document["notes"])
    if edited:
        console.print("Left: ‖Δ‖ over what it was before surgery edited this checkpoint.")
    for line in written:
        console.print(line, soft_wrap=True)


def show_ranks(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    """Print the spectra by module, the means over the layers, then a line for each file that was written."""
    if as_json:
        show_json(document)
        return
    console = new_console()
    modules: dict[str, list[dict[str, Any]]] = {}
    for line in document["tensors"]:
        modules.setdefault(line["module"], []).append(line)
    rows = [
        [
            name,
            f"{sum(line['matrices'] for line in lines):,}",
            *(fixed(_average(lines, "stable_rank"), 1), share(_average(lines, "energy_1"), 1)),
            *(share(_average(lines, "energy_k"), 1), f"{sum(line['intruders'] or 0 for line in lines):,}"),
        ]
        for name, lines in modules.items()
    ]
    leading = f"Top {document['k']}"
    _print(console, ["Module", "Matrices", "Stable rank", "Top 1", leading, "Intruders"], rows, total=False)
    print_notes(console, document["notes"])
    console.print(
        f"Stable rank: ‖Δ‖² / σ₁². Top: the share of ‖Δ‖² in so many singular values. Means over layers. Intruders: of the "
        f"{document['k']} leading left singular vectors of ft, those with no |cosine| of {document['epsilon']} with pre's."
    )
    for text in written:
        console.print(text, soft_wrap=True)


def _average(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line[name] is not None]
    return fmean(values) if values else None


def show_tensor(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    """Print the measurements of one tensor, then a line for each file that was written."""
    if as_json:
        show_json(document)
        return
    (line,) = document["tensors"]
    console = new_console()
    shape = " × ".join(map(str, line["shape"])) or "scalar"
    console.print(f"{line['name']}: {line['dtype']}, {shape}, {label(line['category'])}", soft_wrap=True)
    _print(
        console,
        ["", "Entries", "Unchanged", "‖Δ‖", "‖W‖", "‖Δ‖/‖W‖", *(["Left"] if line["remaining"] is not None else [])],
        [
            [
                "",
                count(line["entries"]),
                share(line["unchanged_share"], 2),
                *(brief(line[name]) for name in ("delta_norm", "weight_norm", "relative_norm")),
                *([share(line["remaining"], 2)] if line["remaining"] is not None else []),
            ]
        ],
        total=False,
    )
    notes = list(document["notes"])
    if line["fapm_same"]["stop"] is not None:
        start, stop = _from_to(line["fapm_same"])
        notes.append(f"FAPM is the same at every sparsity from {start} to {stop}.")
    rows = [[*_quantiles("|Δ|", line["delta"]), ""], [*_quantiles("|Δ| / |W|", line["ratio"]), _infinite(line)]]
    _print(console, ["", *_quantile_names(), "∞"], rows, total=False)
    print_notes(console, notes)
    for text in written:
        console.print(text, soft_wrap=True)


def _head(first: str, edited: bool) -> list[str]:
    return [first, "Tensors", "Entries", "Unchanged", "‖Δ‖/‖W‖", "", "D", *(["Left"] if edited else [])]


def _row(name: str, group: dict[str, Any], groups: dict[str, dict[str, Any]], edited: bool) -> list[str]:
    return [
        name,
        f"{group['tensors']:,}",
        count(group["entries"]),
        share(group["unchanged_share"], 2),
        _relative(group["relative_norm"]),
        _bar(group, groups),
        _relative(group["distance"]),
        *([share(group["remaining"], 2)] if edited else []),
    ]


def _layer(name: str, group: dict[str, Any], layers: dict[str, dict[str, Any]], edited: bool) -> list[str]:
    return [
        name,
        share(group["unchanged_share"], 2),
        _relative(group["relative_norm"]),
        _bar(group, layers),
        # In an edited checkpoint most entries did not move: the median says nothing.
        *(brief(group[what][quantile]) for what in ("delta", "ratio") for quantile in ("q50", "q99")[edited:]),
        *([share(group["remaining"], 2)] if edited else []),
    ]


def _quantile_names() -> list[str]:
    return [*(f"{part:.0%}" for part in QUANTILES.values()), "max"]


def _quantiles(name: str, found: dict[str, float | None]) -> list[str]:
    return [name, *map(brief, found.values())]


def _from_to(same: dict[str, float]) -> list[str]:
    """Between which sparsities."""
    return [fixed(same[name], 2) for name in ("start", "stop")]


def _infinite(group: dict[str, Any]) -> str:
    return count(group["ratio_infinite"])


def _bar(group: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
    """The group's norm as a bar, full for the largest of the groups."""
    norms = [other["relative_norm"] or 0.0 for other in groups.values()]
    return meter(group["relative_norm"] or 0.0, max(norms, default=0.0), BAR)


def _relative(value: float | None) -> str:
    return brief(value) if value is None or 0 < value < 1e-3 else fixed(value)


def _print(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = True) -> None:
    table = new_table(*head)
    for position, row in enumerate(rows):
        last = total and position == len(rows) - 1
        if last:
            table.add_section()
        table.add_row(*row, style="bold" if last else None)
    console.print(table)
