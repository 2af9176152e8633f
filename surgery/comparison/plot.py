"""Draw the pictures of `surgery compare` and `surgery sweep`, for files and the HTML page; legible when printed 80 mm wide.

`surgery.comparison.charts` computes what a picture shows. A point or bar of row N has the id "row-N", by which the page finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.comparison.charts import bars, curve_charts, pareto_chart, race_chart, series
from surgery.comparison.text import score
from surgery.pictures import INK, LIGHT, LINE, MUTED, PAPER, SERIES, drawable, render, without_glyph_warnings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v")
# In inches: twice 80 mm, so that a text of 11 points here has 5.5 points on paper.
WIDTH = 6.3
TEXT, SMALL = 11, 9.5
# The most bars in a group, characters of a label, and points that are all labelled.
MOST, LONGEST, CROWD = 8, 22, 20
# Distances of a label from its point, in typographic points, and directions, in the order in which they are tried.
AWAY = (7, 14, 22, 32, 44, 58)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.75, 0.75), (-0.75, 0.75), (0.75, -0.75), (-0.75, -0.75))

Box = tuple[float, float, float, float]


def plots(document: dict[str, Any]) -> dict[str, bytes]:
    """Draw the pictures of a comparison: pareto, skills, for a sweep curves, and for a search race.

    Args:
        document: what results.json holds.

    Returns:
        Name of a file -> its content, each picture as .svg and as .png.
    """
    figures = {"pareto": pareto(document), "skills": skills(document)}
    if "auto" in document:
        figures["race"] = race(document)
    if curve_charts(document):
        figures["curves"] = curves(document)
    return {f"{name}.{kind}": render(figure, kind) for name, figure in figures.items() for kind in ("svg", "png")}


def pareto(document: dict[str, Any], width: float = WIDTH) -> Figure:
    """Draw retention against forgetting. Lines join the rows of a method, dashed steps the Pareto-optimal rows.

    Args:
        width: in inches.
    """
    from matplotlib.figure import Figure

    chart, groups = pareto_chart(document), series(document)
    figure = Figure((width, 5.6), layout="constrained")
    axes = figure.subplots()
    _frame(axes, chart)
    if len(chart["front"]) > 1:
        axes.plot(
            *zip(*chart["front"], strict=True), color=MUTED, ls=(0, (4, 3)), lw=1, drawstyle="steps-pre", gid="front"
        )
    _lines(axes, chart)
    points = chart["points"]
    for point in points:
        _point(axes, point, whiskers=True)
    if not points:
        axes.text(0.5, 0.5, "no row has finite numbers", transform=axes.transAxes, ha="center", color=MUTED)
    _legend(axes, chart, [group.name if len(group.rows) > 1 or len(points) > CROWD else "" for group in groups], -0.1)
    axes.margins(0.09)
    with without_glyph_warnings():
        figure.draw_without_rendering()  # fixes where the axes are, so that labels can be placed in points
    figure.set_layout_engine("none")
    _name_points(axes, points)
    return figure


def race(document: dict[str, Any], width: float = WIDTH) -> Figure:
    """Draw all candidates of a search where the race left them, the paler the fewer items they saw; the winner is named."""
    from matplotlib.figure import Figure

    chart = race_chart(document)
    figure = Figure((width, 5.6), layout="constrained")
    axes = figure.subplots()
    _frame(axes, chart)
    for point in chart["points"]:
        style = {"marker": MARKERS[point["series"] % len(MARKERS)], "color": SERIES[point["series"] % len(SERIES)]}
        edge = INK if point["finalist"] else PAPER
        axes.plot(*point["at"], ls="", ms=7, mec=edge, mew=1, alpha=0.25 + 0.75 * point["seen"], zorder=3, **style)
        if point["winner"]:
            axes.annotate(
                drawable(point["label"], LONGEST),
                point["at"],
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL,
                weight="bold",
            )
    for name, line in (("x", axes.axvline), ("y", axes.axhline)):
        if chart[name]["limit"] is not None:
            line(chart[name]["limit"], color=MUTED, ls=(0, (4, 3)), lw=1)
    _legend(axes, chart, chart["names"], -0.1)
    axes.margins(0.09)
    return figure


def curves(document: dict[str, Any]) -> Figure:
    """Draw the downstream and the general score against the swept number (FAPM paper, Figures 2 and 5), a column for each axis.

    Bands are 95% intervals; dotted lines are the scores of pre and ft.
    """
    from matplotlib.figure import Figure

    columns, names = curve_charts(document), [group.name for group in series(document)]
    figure = Figure((max(WIDTH, 4.2 * len(columns)), 6.6), layout="constrained")
    grid = figure.subplots(2, max(len(columns), 1), squeeze=False, sharex="col", sharey="row")
    for column, charts in enumerate(columns):
        for line, chart in enumerate(charts):
            axes = grid[line][column]
            _frame(axes, chart)
            axes.set_title(drawable(chart["title"], 40), fontsize=TEXT, loc="left")
            _levels(axes, chart)
            _lines(axes, chart)
            for point in chart["points"]:
                _point(axes, point, whiskers=False)
            if line == 0:
                axes.set_xlabel("")
                axes.tick_params(labelbottom=False)
            else:
                _legend(axes, chart, names, -0.18)
            if column:
                axes.set_ylabel("")
                axes.set_title("")
    return figure


def skills(document: dict[str, Any], most: int = MOST, width: float = WIDTH) -> Figure:
    """Draw a panel of bars for each measure, on its own scale, with 95% intervals.

    Args:
        most: the most rows in a panel; all panels show the same rows.
        width: in inches.
    """
    from matplotlib.figure import Figure

    groups = bars(document, most)
    columns = min(len(groups), 2)
    lines = -(-len(groups) // columns)
    held = len(groups[0]["bars"])
    figure = Figure((width, lines * (0.27 * held + 0.75)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, group in zip(grid.flat, groups, strict=False):
        _bars(axes, group)
    grid[0][0].set_ylim(held - 0.4, -0.6)
    return figure


def _bars(axes: Axes, group: dict[str, Any]) -> None:
    limit = group["limit"]
    for place, bar in enumerate(group["bars"]):
        if bar["value"] is None:
            continue
        axes.barh(
            place, min(bar["value"], limit), 0.72, color=_colour(bar["series"], bar["role"]), gid=f"row-{bar['row']}"
        )
        if bar["low"] is not None and bar["high"] is not None:
            axes.plot([min(bar["low"], limit), min(bar["high"], limit)], [place, place], color=INK, lw=1.1)
        axes.text(limit * 1.04, place, score(group["kind"], bar["value"]), va="center", fontsize=SMALL, color=INK)
    axes.set_xlim(0, limit * 1.34)
    axes.set_xticks([])
    axes.set_yticks(
        range(len(group["bars"])), [drawable(bar["label"], LONGEST) for bar in group["bars"]], fontsize=SMALL
    )
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(MUTED)
    better = "higher is better" if group["higher"] else "lower is better"
    axes.set_title(f"{drawable(group['name'], LONGEST)} ({better})", fontsize=TEXT - 1, loc="left")


def _frame(axes: Axes, chart: dict[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_xlabel(chart["x"]["label"], fontsize=TEXT)
    axes.set_ylabel(chart["y"]["label"], fontsize=TEXT)
    axes.tick_params(labelsize=SMALL, colors=MUTED, length=0)
    axes.grid(color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    for axis, scale in ((axes.xaxis, chart["x"]), (axes.yaxis, chart["y"])):
        if scale["percent"]:
            axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_inverted(scale["flip"])


def _lines(axes: Axes, chart: dict[str, Any]) -> None:
    for line in chart["lines"]:
        x, y, low, high = zip(*line["points"], strict=True)
        colour = _colour(line["series"], "other")
        axes.plot(x, y, color=colour, lw=1.8, zorder=2.2)
        if None not in (*low, *high):
            axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)


def _levels(axes: Axes, chart: dict[str, Any]) -> None:
    for level in chart["levels"]:
        axes.axhline(level["y"], color=LIGHT[level["name"]], ls=":", lw=1.4)
        axes.annotate(
            level["name"],
            (1, level["y"]),
            xytext=(3, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )


def _point(axes: Axes, point: dict[str, Any], *, whiskers: bool) -> None:
    (x, left, right), (y, low, high) = point["x"], point["y"]
    colour = _colour(point["series"], point["role"])
    if whiskers and None not in (left, right):
        axes.plot([left, right], [y, y], color=colour, alpha=0.45, lw=1)
    if whiskers and None not in (low, high):
        axes.plot([x, x], [low, high], color=colour, alpha=0.45, lw=1)
    edge = INK if point["pareto"] else PAPER
    marker = MARKERS[0 if point["series"] is None else point["series"] % len(MARKERS)]
    front = 3.0 if point["role"] == "other" else 3.5
    axes.plot(x, y, marker, color=colour, ms=7, mec=edge, mew=1, zorder=front, gid=f"row-{point['row']}")


def _legend(axes: Axes, chart: dict[str, Any], names: Sequence[str], drop: float) -> None:
    """Draw a legend of the chart's series. A series whose name is empty is left out."""
    from matplotlib.lines import Line2D

    here = sorted({point["series"] for point in chart["points"] if point["series"] is not None})
    keys = []
    for index in filter(names.__getitem__, here):
        style = {"marker": MARKERS[index % len(MARKERS)], "color": SERIES[index % len(SERIES)]}
        keys.append(Line2D([], [], ls="", label=drawable(names[index], 40), **style))
    if keys:
        axes.legend(
            handles=keys,
            loc="upper center",
            bbox_to_anchor=(0.5, drop),
            ncols=max(1, min(len(keys), 4, 64 // (4 + max(len(str(key.get_label())) for key in keys)))),
            fontsize=SMALL,
            frameon=False,
            handletextpad=0.2,
            columnspacing=1.2,
        )


def _colour(group: int | None, role: str) -> str:
    return LIGHT[role] if group is None else SERIES[group % len(SERIES)]


def _name_points(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    """Label the points where a label covers no point and no other label, and join a distant label to its point by a line.

    A point without such a place has no label.
    """
    dots = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    area = axes.get_window_extent()
    bounds = (area.x0 * dots, area.y0 * dots, area.x1 * dots, area.y1 * dots)
    at = {point["row"]: axes.transData.transform((point["x"][0], point["y"][0])) * dots for point in points}
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at.values()]
    crowded = len(points) > CROWD
    for point in sorted(points, key=lambda point: -point["rank"]):
        if crowded and not point["rank"]:
            continue
        label = drawable(point["label"], LONGEST)
        wide, tall = 0.6 * SMALL * len(label), 1.15 * SMALL
        x, y = at[point["row"]]
        for box, far in _spots(x, y, wide, tall, AWAY[:3] if crowded else AWAY):
            inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                middle = ((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y)
                axes.annotate(
                    label,
                    (point["x"][0], point["y"][0]),
                    xytext=middle,
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=SMALL,
                    color=INK,
                    weight="bold" if point["rank"] > 1 else "normal",
                    arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
                    if far
                    else None,
                    zorder=4,
                    bbox={"facecolor": PAPER, "alpha": 0.75, "pad": 0.5, "lw": 0},
                )
                break


def _spots(x: float, y: float, wide: float, tall: float, rings: Sequence[float]) -> Iterator[tuple[Box, bool]]:
    """Yield the boxes that the label of a point may take, nearest first, and whether it would need a line."""
    for away in rings:
        for across, up in DIRECTIONS:
            left = x + across * away - (0 if across > 0 else wide if across < 0 else wide / 2)
            below = y + up * away - (0 if up > 0 else tall if up < 0 else tall / 2)
            yield (left, below, left + wide, below + tall), away > AWAY[0]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
