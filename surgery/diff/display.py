"""The tables of `surgery diff`: where fine-tuning went, at 80 columns, with bars that need no colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from surgery.diff.quantiles import QUANTILES
from surgery.display import count, label, new_console, new_table, percent, print_notes, readable

BAR = 8
EIGHTHS = " ▏▎▍▌▋▊▉█"
# For terminals without these characters.
PLAIN = str.maketrans(
    {"‖": "|", "Δ": "d", "–": "-", "█": "#", "≤": "<=", "∞": "inf", **dict.fromkeys(EIGHTHS[1:4], " ")}
)
PLAIN |= str.maketrans(dict.fromkeys(EIGHTHS[4:8], "#"))


def show_diff(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    """Print what was measured: by category and by layer, then what was written elsewhere."""
    if as_json:
        _json(document)
        return
    console = new_console()
    groups = {label(name): group for name, group in document["categories"].items()} | {"all": document["totals"]}
    edited = document["totals"]["remaining"] is not None
    _print(console, _head("Category", edited), [_row(name, group, groups, edited) for name, group in groups.items()])
    _print(console, ["|Δ|", *_quantile_names()], [_quantiles(name, group["delta"]) for name, group in groups.items()])
    ratios = [[*_quantiles(name, group["ratio"]), _infinite(group)] for name, group in groups.items()]
    _print(console, ["|Δ| / |W|", *_quantile_names(), "∞"], ratios)
    stacks = dict.fromkeys(group["stack"] for group in document["layers"])
    for stack in stacks:
        layers = {str(group["layer"]): group for group in document["layers"] if group["stack"] == stack}
        title = ["Layer", "Unchanged", "‖Δ‖/‖W‖", ""]
        title += ["|Δ| 99%", "|Δ|/|W| 99%", "Left"] if edited else ["|Δ| 50%", "99%", "|Δ|/|W| 50%", "99%"]
        if len(stacks) > 1:
            console.print(readable(stack), soft_wrap=True)
        _print(console, title, [_layer(name, group, layers, edited) for name, group in layers.items()], total=False)
    print_notes(console, document["notes"])
    if edited:
        console.print("Left: ‖Δ‖ over what it was before surgery edited this checkpoint.".translate(_words(console)))
    for line in written:
        console.print(line, soft_wrap=True)


def show_tensor(document: dict[str, Any], written: Sequence[str], *, as_json: bool) -> None:
    """Print what was measured of one tensor."""
    if as_json:
        _json(document)
        return
    (line,) = document["tensors"]
    console = new_console()
    shape = " × ".join(map(str, line["shape"])) or "scalar"
    console.print(f"{readable(line['name'])}: {line['dtype']}, {shape}, {label(line['category'])}", soft_wrap=True)
    _print(
        console,
        ["", "Entries", "Unchanged", "‖Δ‖", "‖W‖", "‖Δ‖/‖W‖", *(["Left"] if line["remaining"] is not None else [])],
        [
            [
                "",
                count(line["entries"]),
                percent(line["unchanged_share"]),
                *(_number(line[name]) for name in ("delta_norm", "weight_norm", "relative_norm")),
                *([percent(line["remaining"])] if line["remaining"] is not None else []),
            ]
        ],
        total=False,
    )
    rows = [[*_quantiles("|Δ|", line["delta"]), ""], [*_quantiles("|Δ| / |W|", line["ratio"]), _infinite(line)]]
    _print(console, ["", *_quantile_names(), "∞"], rows, total=False)
    print_notes(console, document["notes"])
    for text in written:
        console.print(text, soft_wrap=True)


def _json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def _head(first: str, edited: bool) -> list[str]:
    return [first, "Tensors", "Entries", "Unchanged", "‖Δ‖/‖W‖", "", "D", *(["Left"] if edited else [])]


def _row(name: str, group: dict[str, Any], groups: dict[str, dict[str, Any]], edited: bool) -> list[str]:
    return [
        name,
        f"{group['tensors']:,}",
        count(group["entries"]),
        percent(group["unchanged_share"]),
        _relative(group["relative_norm"]),
        _bar(group, groups),
        _relative(group["distance"]),
        *([percent(group["remaining"])] if edited else []),
    ]


def _layer(name: str, group: dict[str, Any], layers: dict[str, dict[str, Any]], edited: bool) -> list[str]:
    return [
        name,
        percent(group["unchanged_share"]),
        _relative(group["relative_norm"]),
        _bar(group, layers),
        # Of an edited checkpoint most entries did not move.
        *(_number(group[what][share]) for what in ("delta", "ratio") for share in ("q50", "q99")[edited:]),
        *([percent(group["remaining"])] if edited else []),
    ]


def _quantile_names() -> list[str]:
    return [*(f"{share:.0%}" for share in QUANTILES.values()), "max"]


def _quantiles(name: str, found: dict[str, float | None]) -> list[str]:
    return [name, *map(_number, found.values())]


def _infinite(group: dict[str, Any]) -> str:
    return count(group["ratio_infinite"])


def _bar(group: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
    """A bar of up to BAR characters, full for the largest of the groups."""
    largest = max((other["relative_norm"] or 0.0 for other in groups.values()), default=0.0)
    share = (group["relative_norm"] or 0.0) / largest if largest else 0.0
    full, rest = divmod(round(share * BAR * 8), 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def _relative(value: float | None) -> str:
    return _number(value) if value is None or 0 < value < 1e-3 else f"{value:.4f}"


def _number(value: float | None) -> str:
    """Three digits in at most seven characters."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= value < 1000 else f"{value:.1e}"


def _print(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = True) -> None:
    words = _words(console)
    table = new_table(*(name.translate(words) for name in head))
    for column, name in zip(table.columns, head, strict=True):
        column.justify = "left" if name == "" or column is table.columns[0] else "right"
    for position, row in enumerate(rows):
        last = total and position == len(rows) - 1
        if last:
            table.add_section()
        table.add_row(*(cell.translate(words) for cell in row), style="bold" if last else None)
    console.print(table)


def _words(console: Console) -> dict[int, str]:
    return PLAIN if console.options.ascii_only else {}
