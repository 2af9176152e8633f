"""The methods, one file each. A new one is a file and a line here."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import Any

from surgery.methods.breadcrumbs import Breadcrumbs
from surgery.methods.dare import Dare
from surgery.methods.dg_hard import DgHard
from surgery.methods.fapm import Fapm
from surgery.methods.half_reset import HalfReset
from surgery.methods.hma import Hma
from surgery.methods.intruder import Intruder
from surgery.methods.lines import Lines
from surgery.methods.magnitude import Magnitude
from surgery.methods.method import Method, main_option
from surgery.methods.relative import Relative
from surgery.methods.salience import Salience
from surgery.methods.ties import Ties
from surgery.methods.wanda import Wanda


def parameters(method: Method) -> dict[str, Any]:
    """A method's parameters, for the report; what was measured for it is not among them.

    Where there is a number for each depth, the main number has no meaning and is left out.
    """
    unused = main_option(type(method)).name if method.depth else "depth"
    everything: dict[str, Any] = {
        entry.name: getattr(method, entry.name)
        for entry in fields(method)
        if entry.metadata.get("parameter", True) and entry.name != unused
    }
    return {name: asdict(value) if is_dataclass(value) else value for name, value in everything.items()}  # type: ignore[arg-type]


__all__ = [
    "METHODS",
    "Breadcrumbs",
    "Dare",
    "DgHard",
    "Fapm",
    "HalfReset",
    "Hma",
    "Intruder",
    "Lines",
    "Magnitude",
    "Method",
    "Relative",
    "Salience",
    "Ties",
    "Wanda",
    "parameters",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Fapm, Magnitude, Relative, Breadcrumbs, Salience, HalfReset, Hma, Lines, DgHard, Intruder),
        *(Ties, Dare, Wanda),
    )
}
