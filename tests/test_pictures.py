"""Pictures as files: each kind is what its name says, and the same figure gives the same bytes."""

from __future__ import annotations

import importlib.util
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from surgery.errors import OptionError
from surgery.pictures import DARK, ENDINGS, LIGHT, SERIES, check_matplotlib, drawable, render


def figure(text: str = "a name") -> Figure:
    found = Figure((2, 1))
    found.subplots().set_title(drawable(text))
    return found


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_the_same_figure_gives_the_same_file(kind: str, magic: bytes) -> None:
    first = render(figure(), kind)
    assert first.startswith(magic)
    assert render(figure(), kind) == first
    assert f".{kind}" in ENDINGS


@pytest.mark.parametrize("name", ["$\\frac{1}{0}$", "a_b^c", "\x1b[2J\n\u202e", "模型", "x" * 500, "\\$", "<&>"])
def test_any_name_can_be_drawn(name: str, recwarn: pytest.WarningsRecorder) -> None:
    content = render(figure(name), "svg", embedded=True)
    texts = [element.text or "" for element in ElementTree.fromstring(content).iter("{http://www.w3.org/2000/svg}text")]
    if len(name) < 100 and name.isprintable():
        assert name.replace("\\$", "$") in [text.replace("\\$", "$") for text in texts]
    assert max(map(len, texts)) <= 60
    assert not recwarn.list


def test_the_two_palettes_name_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(SERIES)) == 6


def test_without_matplotlib_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_matplotlib("plot")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"^`report` needs matplotlib: pip install"):
        check_matplotlib("report")
