"""Pictures of `surgery diff`: the heat map of layers and modules, and the four panels of one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import OptionError
from surgery.layout import CATEGORIES, module, place
from surgery.pictures import HEAT, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from surgery.diff.panels import Panels

MISSING = "#d0d0d0"
TITLES = {"weight": "|W_pre|", "delta": "|Δ|", "ratio": "|Δ| / |W_pre|", "score": "FAPM score"}
# The scale of colours is logarithmic if the largest value is this many times the median.
SKEWED = 3.0
# In inches: side of a cell, room for the numbers of layers, width of a letter of a column's name, height of the tallest grid.
CELL, LEFT, LETTER, TALLEST = 0.32, 0.75, 0.062, 11.0


def relative_norms(
    document: dict[str, Any],
) -> tuple[dict[str, dict[tuple[int, str], float | None]], dict[str, float | None]]:
    """Return ‖Δ‖/‖W‖ of each cell of the heat map: a module's weight, its bias and its experts are one cell.

    Returns:
        stack -> (layer, module) -> value, and module -> value for modules outside the stacks. A value is None if a norm is
        not finite or ‖W‖ is 0. Modules are in the order of `CATEGORIES`, then of the files; outside the stacks those at the
        model's input come first.
    """

    def order(line: dict[str, Any]) -> tuple[bool, int]:
        return place(line["name"]).side == "output", CATEGORIES.index(line["category"])

    lines = sorted(document["tensors"], key=order)
    groups: dict[tuple[str, int | None, str], list[dict[str, Any]]] = {}
    for line in lines:
        if not place(line["name"]).buffer:
            groups.setdefault((line["stack"], line["layer"], module(line["name"])), []).append(line)
    stacks: dict[str, dict[tuple[int, str], float | None]] = {}
    outside: dict[str, float | None] = {}
    for (stack, layer, name), held in groups.items():
        if layer is None:
            outside[name] = _together(held)
        else:
            stacks.setdefault(stack, {})[layer, name] = _together(held)
    return stacks, outside


def heat_map(document: dict[str, Any]) -> Figure:
    """Draw ‖Δ‖/‖W‖ as colours: layers × modules of each stack, and a strip of modules outside. Grey is missing.

    Raises:
        OptionError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    stacks, outside = relative_norms(document)
    grids = [(stack, *_grid(cells)) for stack, cells in stacks.items()]
    if outside:
        values = np.array([list(outside.values())], dtype=np.float64)
        grids.append(("outside the layers", [], list(outside), values))
    if not grids:
        raise OptionError("The two models share no tensor that could be drawn. Leave the picture out.")
    scale = _scale(np.concatenate([values.ravel() for *_, values in grids]))
    title = f"‖Δ‖ / ‖W‖ by layer and module: {_models(document)}"
    # All in inches; `top` counts from the lower edge.
    cell = min(max(TALLEST / max(len(values) for *_, values in grids), 0.08), CELL)
    below = [LETTER * max(map(len, map(drawable, columns))) + 0.55 for _, _, columns, _ in grids]
    widest = CELL * max(len(columns) for _, _, columns, _ in grids)
    width = LEFT + max(widest + 1.1, 0.08 * len(title))
    heights = [max(cell * len(values), 0.2) for *_, values in grids]
    height = 0.65 + sum(heights) + sum(below)
    figure, top = Figure((width, height)), height - 0.65

    def place_axes(x: float, top: float, wide: float, tall: float) -> Axes:
        return figure.add_axes((x / width, (top - tall) / height, wide / width, tall / height))

    image, bar = None, min(max(heights[0], 1.2), 4.0)
    scale_axes = place_axes(LEFT + widest + 0.25, top, 0.14, bar)
    for (name, rows, columns, values), tall, names in zip(grids, heights, below, strict=True):
        axes = place_axes(LEFT, top, CELL * len(columns), tall)
        image = _draw(axes, values, scale)
        axes.set_xticks(range(len(columns)), list(map(drawable, columns)), rotation=90, fontsize=7)
        axes.set_title(drawable(name), fontsize=8, loc="left", pad=3)
        _label_rows(axes, rows, cell)
        top -= tall + names
    figure.colorbar(image, cax=scale_axes).ax.tick_params(labelsize=7)  # type: ignore[arg-type]
    figure.suptitle(title, fontsize=9, x=LEFT / width, y=1 - 0.12 / height, ha="left", va="top")
    return figure


def spectra(document: dict[str, Any]) -> Figure:
    """Draw the singular values of Δ over their number, as shares of the largest, a panel for each module and a line for each
    layer, from dark (the first) to light.

    Raises:
        OptionError: there is nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    modules: dict[str, list[dict[str, Any]]] = {}
    for line in document["tensors"]:
        if line["spectrum"]:
            modules.setdefault(line["module"], []).append(line)
    if not modules:
        raise OptionError(
            "No matrix of the two models differs, so there is no spectrum to draw. Leave the picture out."
        )
    across = min(len(modules), 4)
    down = math.ceil(len(modules) / across)
    figure = Figure((0.6 + 2.6 * across, 0.7 + 2.1 * down), layout="constrained")
    figure.suptitle(f"Singular values of Δ / the largest: {_models(document)}", fontsize=9)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes, (name, lines) in zip(panels, modules.items(), strict=False):
        last = max(line["layer"] or 0 for line in lines)
        for line in lines:
            number, value = zip(*line["spectrum"], strict=True)
            shade = 0.85 * (line["layer"] or 0) / max(last, 1)
            axes.loglog(number, [each / value[0] for each in value], color=colormaps[HEAT](shade), linewidth=0.8)
        axes.set_title(drawable(name), fontsize=8)
        axes.set_ylim(1e-3, 1.5)
        axes.tick_params(labelsize=7)
    for axes in panels[len(modules) :]:
        axes.remove()
    return figure


def four_panels(panels: Panels, name: str) -> Figure:
    """Draw |W_pre|, |Δ|, |Δ| / |W_pre| and FAPM's score of one tensor; colours range from the 5th to the 95th percentile."""
    from matplotlib.figure import Figure

    rows, columns = panels.shape
    figure = Figure((13, 3.9), layout="constrained")
    down, across = panels.block
    reduced = max(down, across) > 1
    cell = f"each cell is the mean of about {down:.3g} × {across:.3g} entries" if reduced else "each cell is an entry"
    figure.suptitle(f"{drawable(name)}, {rows:,} × {columns:,}: {cell}", fontsize=9)
    for position, (axes, (key, values)) in enumerate(zip(figure.subplots(1, 4), panels.cells.items(), strict=True)):
        image = _draw(axes, values, _middle(values), extent=(0, columns, rows, 0))
        axes.set_title(TITLES[key], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if position:
            axes.set_yticklabels([])
        figure.colorbar(image, ax=axes, extend="both").ax.tick_params(labelsize=7)
    return figure


def _together(lines: Sequence[dict[str, Any]]) -> float | None:
    """Return ‖Δ‖/‖W‖ over all entries of several tensors."""
    if any(line["delta_norm"] is None or line["weight_norm"] is None for line in lines):
        return None
    whole = math.hypot(*(line["weight_norm"] for line in lines))
    return math.hypot(*(line["delta_norm"] for line in lines)) / whole if whole else None


def _grid(cells: dict[tuple[int, str], float | None]) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return the layers, the modules, and the values [layers, modules], NaN where there is no value."""
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(name for _, name in cells))
    found = [[cells.get((layer, name)) for name in modules] for layer in layers]
    return list(map(str, layers)), modules, np.array(found, dtype=np.float64)


def _scale(values: NDArray[np.float64]) -> Normalize:
    """Return a scale from 0 to the largest value, or a logarithmic one if that is far above the others."""
    from matplotlib.colors import LogNorm, Normalize

    moved = values[np.isfinite(values) & (values > 0)]
    largest = float(moved.max()) if len(moved) else 1.0
    if len(moved) and largest > SKEWED * np.median(moved):
        return LogNorm(max(float(moved.min()), largest * 1e-6), largest)
    return Normalize(0, largest)


def _middle(values: NDArray[np.float64]) -> Normalize:
    """Return a scale from the 5th to the 95th percentile: ratios and scores have long tails."""
    from matplotlib.colors import Normalize

    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (5, 95)) if len(finite) else (0.0, 0.0)
    return Normalize(low, high if high > low else low + 1)


def _draw(axes: Axes, values: NDArray[np.float64], scale: Normalize, **options: Any) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    if isinstance(scale, LogNorm):  # zero gets the lowest colour, not that of a missing value
        values = np.maximum(values, scale.vmin or 0.0)
    colours = colormaps[HEAT].with_extremes(bad=MISSING)
    return axes.imshow(values, colours, scale, aspect="auto", interpolation="nearest", **options)


def _label_rows(axes: Axes, rows: Sequence[str], cell: float) -> None:
    if not rows:
        axes.set_yticks([])
        return
    step = next((step for step in (1, 2, 5, 10) if step * cell >= 0.12), 20)
    axes.set_yticks(range(0, len(rows), step), list(rows[::step]), fontsize=7)
    axes.set_ylabel("layer", fontsize=8)


def _models(document: dict[str, Any]) -> str:
    ft, pre = (drawable(document[side]["repo"] or Path(document[side]["folder"]).name) for side in ("ft", "pre"))
    return f"{ft} against {pre}"
