"""Shared by all plots: colours, shortened names, and figures as files.

Pictures are drawn by matplotlib in memory, without a display; the same numbers give the same SVG.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError
from surgery.paths import Kind
from surgery.text import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Endings of the files that a figure can be written to, and what tells programs that surgery drew one.
ENDINGS = (".png", ".svg", ".pdf")
MARK = "model-surgery"
# Colours by name, on white and on a dark ground. c0, c1, … are those of Okabe and Ito, which the colour-blind can tell apart.
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1e23",
    "muted": "#5c636d",
    "line": "#e2e3e1",
    "pre": "#8a9099",
    "ft": "#3d434c",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#cc79a7",
    "c4": "#e69f00",
    "c5": "#56b4e9",
}
DARK = {
    "paper": "#121418",
    "ink": "#e9eaec",
    "muted": "#a0a7b1",
    "line": "#2e333b",
    "pre": "#7b828c",
    "ft": "#c9ced6",
    "c0": "#3d9be0",
    "c1": "#f08a3c",
    "c2": "#2bbf93",
    "c3": "#dd93bb",
    "c4": "#f0b429",
    "c5": "#7cc7f2",
}
PAPER, INK, MUTED, LINE = (LIGHT[name] for name in ("paper", "ink", "muted", "line"))
SERIES = tuple(colour for name, colour in LIGHT.items() if name.startswith("c"))
HEAT = "viridis"  # matplotlib's name for the colours of a heat map
LONGEST = 60  # characters of a name
MOST_BYTES = 1 << 26  # of a picture


def check_matplotlib(name: str = "plot") -> None:
    """Raise OptionError unless the pictures that a parameter asks for can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(f"`{name}` needs matplotlib: pip install 'model-surgery[plot]'.")


def render(figure: Figure, kind: str, *, embedded: bool = False) -> bytes:
    """Return a figure as the content of a file.

    Args:
        kind: "png", "svg" or "pdf".
        embedded: for a page, which has its own background and font.
    """
    import matplotlib

    content = io.BytesIO()
    # Dates are left out: the same figure gives the same file.
    metadata = {
        "png": {"Software": MARK},
        "svg": {"Creator": MARK, "Date": None},
        "pdf": {"Creator": MARK, "CreationDate": None},
    }
    settings: Any = {"svg.hashsalt": "surgery", "svg.fonttype": "none" if embedded else "path"}
    with matplotlib.rc_context(settings), without_glyph_warnings():
        figure.savefig(content, format=kind, dpi=150, metadata=metadata[kind], transparent=embedded)
    return content.getvalue()


def drawn(path: Path) -> bool:
    """Whether a file is a picture of `render`: it carries the mark."""
    raw = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
    marks = {
        b"\x89PNG": f"Software\0{MARK}",
        b"<?xml": f"<dc:title>{MARK}</dc:title>",
        b"%PDF-": f"/Creator ({MARK})",
    }
    return any(raw.startswith(begin) and mark.encode() in raw for begin, mark in marks.items())


PICTURE = Kind("picture", ENDINGS, drawn)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Suppress the warning about letters that the font lacks; they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def drawable(name: str, longest: int = LONGEST) -> str:
    """Make a name `readable` and short, and escape what matplotlib would take for a formula."""
    shown = readable(name)
    return (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")
