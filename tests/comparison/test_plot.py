"""The pictures of `surgery compare` and `surgery sweep`: what is drawn where, read back from the figures, and files that open."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import result_documents as samples

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text

from surgery.comparison.plot import LONGEST, MOST, curves, pareto, plots, skills
from surgery.pictures import PAPER


def points(axes: Axes) -> dict[int, Line2D]:
    """The mark of each row."""
    return {int(str(line.get_gid())[4:]): line for line in axes.lines if str(line.get_gid()).startswith("row-")}


def at(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]  # type: ignore[arg-type]


def joined(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Colour -> the line through several points in it."""
    return {str(line.get_color()): at(line) for line in axes.lines if line.get_linewidth() == 1.8}


def shown(figure: Figure) -> Any:
    """The renderer of a figure that was drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return canvas.get_renderer()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("document", [samples.comparison(), samples.sweep()], ids=["compare", "sweep"])
def test_every_row_is_at_its_retention_and_forgetting(document: dict[str, Any]) -> None:
    (axes,) = pareto(document).axes
    marks = points(axes)
    assert {row: at(mark) for row, mark in marks.items()} == {
        index: [(row["retention"], row["forgetting"])] for index, row in enumerate(document["rows"])
    }
    assert axes.yaxis_inverted()
    assert not axes.xaxis_inverted()
    optimal = {index for index, row in enumerate(document["rows"]) if row["pareto"]}
    assert {index for index, mark in marks.items() if mark.get_markeredgecolor() != PAPER} == optimal
    (front,) = (line for line in axes.lines if line.get_gid() == "front")
    assert at(front) == sorted(
        (document["rows"][index]["retention"], document["rows"][index]["forgetting"]) for index in optimal
    )
    assert front.get_drawstyle() == "steps-pre"
    whiskers = {tuple(at(line)) for line in axes.lines if line.get_alpha() == 0.45}
    for row in document["rows"]:
        assert ((row["retention_low"], row["forgetting"]), (row["retention_high"], row["forgetting"])) in whiskers
        assert ((row["retention"], row["forgetting_low"]), (row["retention"], row["forgetting_high"])) in whiskers


def test_a_line_joins_the_settings_of_a_method_in_their_order() -> None:
    document = samples.sweep()
    (axes,) = pareto(document).axes
    lines = joined(axes)
    assert len(lines) == 2
    for method, line in zip(("fapm", "magnitude"), lines.values(), strict=True):
        rows = sorted(
            (row for row in document["rows"] if row["method"] == method), key=lambda row: row["parameters"]["sparsity"]
        )
        assert line == [(row["retention"], row["forgetting"]) for row in rows]


def test_every_name_of_a_comparison_is_there_and_covers_nothing() -> None:
    document = samples.comparison()
    figure = pareto(document)
    renderer, (axes,) = shown(figure), figure.axes
    names = {text.get_text(): text for text in axes.texts}
    assert names.keys() == {row["label"] for row in document["rows"]}
    # An annotation's own extent has its line in it.
    boxes = [Text.get_window_extent(text, renderer) for text in names.values()]
    marks = [mark.get_window_extent(renderer) for mark in points(axes).values()]
    for number, box in enumerate(boxes):
        inner = box.padded(-2.0)
        assert not any(inner.overlaps(other.padded(-2.0)) for other in [*boxes[:number], *marks])
        assert axes.get_window_extent().padded(2.0).contains(box.x0, box.y0)


def test_curves_show_scores_bands_and_both_ends() -> None:
    document = samples.sweep()
    figure = curves(document)
    assert len(figure.axes) == 6
    downstream, general = figure.axes[0], figure.axes[3]
    rows = [row for row in document["rows"] if row["method"] == "fapm"]
    assert joined(downstream)["#0072b2"] == [(row["parameters"]["sparsity"], row["downstream"]) for row in rows]
    assert joined(general)["#0072b2"] == [(row["parameters"]["sparsity"], row["average"]) for row in rows]
    band = next(found for found in general.collections if isinstance(found, PolyCollection))
    corners = set(map(tuple, np.round(np.asarray(band.get_paths()[0].vertices), 6).tolist()))
    for row in rows:
        for end in ("forgetting_low", "forgetting_high"):
            assert (row["parameters"]["sparsity"], round(0.9 - row[end], 6)) in corners
    levels = {text.get_text(): text.xy[1] for text in general.texts if isinstance(text, Annotation)}
    assert levels == {"pre": pytest.approx(0.9), "ft": pytest.approx(0.779)}
    assert [axes.get_xlabel().split(" ")[0] for axes in figure.axes[3:]] == ["sparsity", "ratio", "mean"]


def test_bars_are_the_scores_of_the_same_few_rows_in_every_panel() -> None:
    document = samples.comparison()
    figure = skills(document)
    assert len(figure.axes) == 4
    for axes, measure in zip(figure.axes, samples.MEASURES, strict=True):
        rows = [row for row in document["rows"] if row["role"] != "other" or row["pareto"]]
        values = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
        assert len(values) <= MOST
        spare = [row for row in document["rows"] if row not in rows]
        expected = {row["scores"][measure["name"]]["value"] for row in rows}
        assert expected <= set(values) <= expected | {row["scores"][measure["name"]]["value"] for row in spare}
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["pre", "ft"]


def test_a_broken_model_does_not_flatten_the_other_bars() -> None:
    document = samples.comparison()
    broken = next(row for row in document["rows"] if row["role"] == "other" and row["pareto"])
    broken["scores"]["WikiText-2"] = {"value": 3e7, "low": 2e7, "high": 5e7, "p": 0.0}
    axes = skills(document).axes[1]
    widths = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert max(widths) < 60
    assert "3.00e+07" in [text.get_text() for text in axes.texts]


def test_the_files_open_and_are_the_same_every_time() -> None:
    document = samples.document("sweep", samples.sweep()["rows"][:6])
    files = plots(document)
    assert set(files) == {f"{name}.{kind}" for name in ("pareto", "skills", "curves") for kind in ("svg", "png")}
    assert {
        name: content for name, content in plots(document).items() if name.endswith(".svg")
    }.items() <= files.items()
    for name, content in files.items():
        if name.endswith(".png"):
            assert imread(io.BytesIO(content)).shape[1] == 945
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_a_comparison_has_no_curves() -> None:
    assert not any(
        name.startswith("curves") for name in plots(samples.document("compare", samples.comparison()["rows"][:3]))
    )


@pytest.mark.filterwarnings("error:constrained_layout", "ignore:Glyph")
def test_hostile_names_and_missing_numbers_are_drawn() -> None:
    document = samples.hostile()
    for number, row in enumerate(document["rows"][2:6]):
        row["label"] = ("$\\frac{", "$x$" * 20, "\x00\ud800\n", "")[number]
        row["retention_low"] = row["forgetting_high"] = None
    document["rows"][6].update(retention=None, downstream=None)
    document["rows"][7].update(forgetting=float("nan"), average=None)
    figure = pareto(document)
    for drawn in (figure, curves(document), skills(document)):
        shown(drawn)
    (axes,) = figure.axes
    assert points(axes).keys() == set(range(len(document["rows"]))) - {6, 7}
    assert all(len(text.get_text().replace("\\", "")) <= LONGEST for text in axes.texts)
    nothing = samples.document("compare", samples.comparison()["rows"][:2])
    for row in nothing["rows"]:
        row.update(forgetting=None, average=None)
    (axes,) = pareto(nothing).axes
    assert [text.get_text() for text in axes.texts] == ["no row has finite numbers"]
