"""The pictures of `surgery diff`: what is drawn where, read back from the figures, and files that open."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, tiny_llama, tiny_llama_pair, write_checkpoint
from helpers.command import call

from surgery.diff import panels
from surgery.diff.measure import comparable, measure, prepare, select
from surgery.diff.panels import NAMES, Panels
from surgery.diff.plot import four_panels, heat_map, relative_norms

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread

PAIR = ("--pre", "pre", "--ft", "ft")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def documented(folder: Path, pre: Tensors, ft: Tensors) -> dict[str, Any]:
    write_checkpoint(folder / "pre", pre)
    write_checkpoint(folder / "ft", ft)
    both = prepare(str(folder / "pre"), str(folder / "ft"))
    return measure(both, comparable(both))


def relative(pre: Tensors, ft: Tensors, *names: str) -> float:
    delta = math.hypot(*(float((ft[name].double() - pre[name].double()).norm()) for name in names))
    return delta / math.hypot(*(float(pre[name].double().norm()) for name in names))


def grids(figure: Figure) -> list[Axes]:
    """The axes that hold an image and have columns with names."""
    return [axes for axes in figure.axes if axes.images and axes.get_xticklabels() and axes.get_title(loc="left")]


def image(axes: Axes) -> np.ma.MaskedArray[Any, Any]:
    (found,) = axes.images
    assert isinstance(found, AxesImage)
    values = found.get_array()
    assert isinstance(values, np.ma.MaskedArray)
    return values


def columns(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_every_cell_of_the_heat_map(tmp_path: Path) -> None:
    pre = tiny_llama(layers=3)
    ft = fine_tuned(pre)
    ft["model.layers.2.mlp.down_proj.weight"] = pre["model.layers.2.mlp.down_proj.weight"].clone()
    layers, outside = grids(heat_map(documented(tmp_path, pre, ft)))
    names = columns(layers)
    assert len(names) == 9
    assert names.index("self_attn.q_proj") < names.index("mlp.up_proj") < names.index("input_layernorm")
    assert image(layers).shape == (3, 9)
    for layer in range(3):
        for column, name in enumerate(names):
            expected = relative(pre, ft, f"model.layers.{layer}.{name}.weight")
            assert image(layers)[layer, column] == pytest.approx(expected, rel=1e-6)
    assert image(layers)[2, names.index("mlp.down_proj")] == 0
    assert columns(outside) == ["model.embed_tokens", "model.norm", "lm_head"]
    for column, name in enumerate(columns(outside)):
        assert image(outside)[0, column] == pytest.approx(relative(pre, ft, f"{name}.weight"), rel=1e-6)
    assert layers.images[0].norm is outside.images[0].norm


def test_experts_and_biases_are_drawn_together_and_what_is_missing_is_masked(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    names += [f"model.layers.{layer}.self_attn.q_proj.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    names += ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    pre = {name: torch.randn(6, 6, generator=generator) for name in names}
    ft = fine_tuned(pre, scale=0.1)
    (layers,) = grids(heat_map(documented(tmp_path, pre, ft)))
    found = dict(zip(columns(layers), np.ma.filled(image(layers), np.nan).T.tolist(), strict=True))
    assert found.keys() == {"self_attn.q_proj", "mlp.experts.#.up_proj", "mlp.up_proj"}
    together = relative(pre, ft, *names[:3])
    np.testing.assert_allclose(found["mlp.experts.#.up_proj"], [math.nan, together], rtol=1e-6)
    for layer in (0, 1):
        both = (f"model.layers.{layer}.self_attn.q_proj.{kind}" for kind in ("weight", "bias"))
        assert found["self_attn.q_proj"][layer] == pytest.approx(relative(pre, ft, *both), rel=1e-6)


def test_each_stack_has_a_grid_of_its_own() -> None:
    document = {
        "tensors": [
            {"name": f"{stack}.{layer}.mlp.fc1.weight", "stack": stack, "layer": layer, "category": "feed_forward"}
            | {"delta_norm": 1.0 + layer, "weight_norm": 2.0}
            for stack in ("vision.layers", "text.layers")
            for layer in (0, 5)
        ],
        **{side: {"repo": None, "folder": side} for side in ("pre", "ft")},
    }
    first, second = grids(heat_map(document))
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("vision.layers", "text.layers")
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "5"]
    assert image(second).tolist() == [[0.5], [3.0]]


def test_one_module_that_moved_far_more_is_drawn_by_powers_of_ten(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32)
    ft = fine_tuned(pre)
    ft[WEIGHT] = pre[WEIGHT] * 1000
    ft["model.norm.weight"] = pre["model.norm.weight"].clone()
    layers, outside = grids(heat_map(documented(tmp_path, pre, ft)))
    scale = layers.images[0].norm
    assert isinstance(scale, LogNorm)
    assert scale.vmax == pytest.approx(999, rel=1e-5)
    assert image(outside)[0, 1] == scale.vmin  # it did not move: the lowest colour, not grey


@pytest.mark.parametrize("layers", [1, 40, 126])
def test_no_label_lies_on_another_or_outside(tmp_path: Path, layers: int) -> None:
    pre = tiny_llama(layers=layers, width=4)
    figure = heat_map(documented(tmp_path, pre, fine_tuned(pre)))
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw(renderer)
    whole = figure.bbox
    for axes in grids(figure):
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
            assert all(whole.contains(*corner) for box in boxes for corner in (box.p0, box.p1))
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    upper, lower = grids(figure)
    lowest = min(label.get_window_extent(renderer).y0 for label in upper.get_xticklabels())
    assert lowest > lower.get_window_extent(renderer).y1


def test_a_norm_that_is_none_is_masked() -> None:
    lines = [{"name": "lm_head.weight", "stack": "", "layer": None, "category": "head", "delta_norm": None}]
    document = {"tensors": [{**lines[0], "weight_norm": 1.0}]}
    assert relative_norms(document) == ({}, {"lm_head": None})


@pytest.mark.parametrize("shape", [(5, 7), (40, 6, 3), (11,), (33, 64), ()])
def test_the_cells_are_means_of_blocks(tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "SIDE", 16)
    monkeypatch.setattr("surgery.engines.chunks.CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    pre = {WEIGHT: torch.randn(shape, generator=generator)}
    ft = {WEIGHT: pre[WEIGHT] + 0.1 * torch.randn(shape, generator=generator)}
    if len(shape) == 2:
        pre[WEIGHT][0, 0] = 0  # an infinite ratio, in no mean
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    found = panels.reduce(select(prepare(str(tmp_path / "pre"), str(tmp_path / "ft")), WEIGHT))
    wide = shape[-1] if shape else 1
    weight = pre[WEIGHT].double().numpy().reshape(-1, wide)
    delta = np.abs(ft[WEIGHT].numpy() - pre[WEIGHT].numpy()).astype(np.float64).reshape(-1, wide)
    weight = np.abs(weight)
    with np.errstate(all="ignore"):
        ratio = delta / weight
        score = delta - weight.mean() * ratio
    tall = len(weight)
    assert found.shape == (tall, wide)
    rows = [np.flatnonzero(np.arange(tall) * min(tall, 16) // tall == row) for row in range(min(tall, 16))]
    across = [np.flatnonzero(np.arange(wide) * min(wide, 16) // wide == column) for column in range(min(wide, 16))]
    for name, values in zip(NAMES, (weight, delta, ratio, score), strict=True):
        values[~np.isfinite(values)] = np.nan
        for row, held in enumerate(rows):
            for column, entries in enumerate(across):
                block = values[np.ix_(held, entries)]
                expected = np.nan if np.isnan(block).all() else np.nanmean(block)
                np.testing.assert_allclose(found.cells[name][row, column], expected, rtol=2e-4, atol=1e-5)


def test_the_four_panels_show_the_cells_and_say_what_a_cell_is() -> None:
    cells = {name: np.arange(512.0 * 256).reshape(512, 256) + number for number, name in enumerate(NAMES)}
    figure = four_panels(Panels((2048, 256), cells), "a.weight")
    assert "each cell is the mean of about 4 × 1 entries" in figure.get_suptitle()
    shown = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in shown] == ["|W_pre|", "|Δ|", "|Δ| / |W_pre|", "FAPM score"]
    for axes, name in zip(shown, NAMES, strict=True):
        np.testing.assert_array_equal(image(axes), cells[name])
    small = {name: values[:5, :7] for name, values in cells.items()}
    assert "each cell is an entry" in four_panels(Panels((5, 7), small), "a").get_suptitle()


@pytest.mark.parametrize("more", [[], ["--tensor", WEIGHT], ["--tensor", "model.norm.weight"]])
def test_the_files_open(tmp_path: Path, more: list[str]) -> None:
    tiny_llama_pair(tmp_path)
    for name in ("a.png", "a.svg", "b.SVG"):
        code, out, err = call("diff", *PAIR, *more, "--plot", name, cwd=tmp_path)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].endswith(f"/{name}")
    pixels = imread(io.BytesIO((tmp_path / "a.png").read_bytes()), format="png")
    assert pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.05
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_names_that_would_upset_a_drawing(tmp_path: Path) -> None:
    names = ["$\\frac{$.weight", "model.layers.0.<&\x1b[31m$x_$.weight", "model.layers.0.汉字.weight", "x" * 3000]
    pre = {name: torch.ones(2, 2) for name in names}
    write_checkpoint(tmp_path / "pre$_$", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    for more in ([], ["--tensor", names[0]], ["--tensor", names[1]], ["--tensor", names[3]]):
        code, out, err = call("diff", "--pre", "pre$_$", "--ft", "ft", "--plot", "h.svg", *more, cwd=tmp_path)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        ElementTree.parse(tmp_path / "h.svg")
