"""Turn a matplotlib figure into a part of the page: with the page's colours and font, and links from points and bars to rows.

The page's policy forbids `style` attributes, so each property becomes an attribute of its own. Colours become the variables of
page.css, which differ on a dark ground. Each link has a <title>, so that browsers show the numbers without a script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from surgery.pictures import LIGHT, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()} | {"#000000": "var(--ink)"}
ROW = re.compile(r"row-(\d+)")
SIZE = re.compile(r"([\d.]+)px")
RING = 8  # radius in typographic points of the circle around a point that reacts to a pointer


def drawing(figure: Figure, name: str, caption: str, titles: Mapping[int, str]) -> str:
    """Return the figure as an `<svg>` element.

    Args:
        name: prefix of the ids in it, unique on the page.
        caption: description for screen readers.
        titles: index of a row -> its label and numbers, a line each.
    """
    root = ElementTree.fromstring(render(figure, "svg", embedded=True))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element, name)
    for element in list(root.iter("g")):
        if found := ROW.fullmatch(element.attrib.pop("id", "")):
            _link(element, int(found[1]), titles)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    settings = {"role": "group", "aria-label": caption, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    root.attrib |= {**settings, "fill": "var(--ink)"}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _restyle(element: ElementTree.Element, name: str) -> None:
    element.tag = element.tag.removeprefix(SVG)
    if element.tag not in ("text", "tspan"):
        element.text = None  # only line breaks
    element.tail = None
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
    style = element.attrib.pop("style", "")
    for part in filter(None, map(str.strip, style.split(";"))):
        key, _, value = part.partition(":")
        if key in ("font", "font-size"):
            key, value = "font-size", (SIZE.search(value) or ["", value])[1]
        elif key == "font-weight" or not key.startswith("font"):
            value = value.strip()
        else:
            continue  # the page has a font of its own
        element.set(key, VARIABLES.get(value, value))
    if style.startswith("font:") and "bold" in style:
        element.set("font-weight", "bold")
    if "id" in element.attrib and not ROW.fullmatch(element.attrib["id"]) and element.tag != "g":
        element.set("id", f"{name}-{element.attrib['id']}")
    if LINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(LINK)[1:]}")
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("url(#", f"url(#{name}-"))


def _link(element: ElementTree.Element, row: int, titles: Mapping[int, str]) -> None:
    """Make the group of a row's point or bar a link to the row of the table."""
    element.tag = "a"
    element.attrib |= {"class": "point", "href": f"#row-{row}", "data-row": str(row)}
    title = ElementTree.Element("title")
    title.text = titles[row]
    element.insert(0, title)
    for mark in element.iter("use"):
        at = {"cx": mark.attrib["x"], "cy": mark.attrib["y"], "r": str(RING)}
        element.append(ElementTree.Element("circle", {"class": "ring", **at}))
        break
