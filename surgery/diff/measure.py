"""Measure where fine-tuning went (`surgery diff`): stream both checkpoints once, and compare each tensor of ft with its base.

    Δ = ft − pre, in float32 from exactly upcast inputs
    unchanged         entries whose bits are pre's (whose value is, where the two types differ)
    relative_norm     ‖Δ‖ / ‖W_pre‖, of a tensor or of all entries of a group
    distance          D(θ, θ0), the mean of relative_norm over a group's tensors (MoFO, D.4)
    fapm_same         between which sparsities FAPM does the same, as `surgery.diff.plateau` counts them
    delta, ratio      quantiles of |Δ| and of |Δ| / |W_pre|, as `surgery.diff.quantiles` counts them

A ratio is 0 where Δ = 0. Where W_pre = 0 and Δ ≠ 0 it is infinite: such ratios are counted apart (ratio_infinite), as are those
too large for float32, and enter no quantile. Where one side has a larger vocabulary, the rows that both have are compared.

For a checkpoint that surgery wrote, `remaining` is ‖Δ‖ divided by ‖Δ‖ before the edit, which is in its report.
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgery import provenance
from surgery.checkpoint.item import Item
from surgery.checkpoint.listing import REPORT
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.source import open_both
from surgery.checkpoint.tensor import Tensor
from surgery.diff.plateau import Plateau, mean, plateau
from surgery.diff.quantiles import Distribution, Histogram, joined, sample_shift
from surgery.engines import kernels
from surgery.engines.chunks import Chunks, Sides
from surgery.engines.kernels import BINS
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.errors import CheckpointError, OptionError
from surgery.layout import CATEGORIES
from surgery.methods import fapm
from surgery.methods.scope import SCOPES
from surgery.paths import Kind
from surgery.text import csv_lines

# How far a measured ‖Δ‖/‖W‖ may be from the one in a report: sums are added up in another order.
SAME = 1e-6
# Histograms of a group are added up when there are this many: seldom enough to save time, often enough to save memory.
PARTS = 16
# How a table of tensors begins.
HEAD = b"name,stack,layer,category,dtype,shape,entries,unchanged,"


@dataclass(frozen=True, slots=True)
class Matched:
    """A tensor of ft with its base in pre; where ft has more rows, only those that pre has."""

    item: Item
    pre: Tensor
    ft: Tensor

    @property
    def nbytes(self) -> int:
        return self.pre.nbytes + self.ft.nbytes


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one tensor.

    Attributes:
        unchanged: entries with the bits of pre.
        infinite: entries whose ratio |Δ| / |W_pre| is infinite.
        delta2, weight2: ‖Δ‖² and ‖W_pre‖².
        delta, ratio: distributions of |Δ| and of |Δ| / |W_pre|.
        fapm: between which sparsities `surgery fapm` does the same; None without entries.
    """

    unchanged: int
    infinite: int
    delta2: float
    weight2: float
    delta: Distribution
    ratio: Distribution
    fapm: Plateau | None


@dataclass
class _Groups:
    """The distributions of each category and each layer. Every worker adds to them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[Any, list[tuple[Distribution, Distribution]]] = field(default_factory=dict)

    def add(self, item: Item, measured: Measured) -> None:
        keys: list[Any] = [item.place.category]
        if item.place.layer is not None:
            keys.append((item.place.stack, item.place.layer))
        with self.lock:
            for key in keys:
                parts = self.parts.setdefault(key, [])
                parts.append((measured.delta, measured.ratio))
                if len(parts) == PARTS:
                    parts[:] = [self.of(key)]

    def of(self, *keys: Any) -> tuple[Distribution, Distribution]:
        """The distributions of |Δ| and |Δ| / |W_pre| over all entries of some groups."""
        parts = [part for key in keys for part in self.parts[key]]
        return joined(delta for delta, _ in parts), joined(ratio for _, ratio in parts)


def prepare(pre: str, ft: str) -> Pair:
    """Open and pair both sides, reading headers only.

    Raises:
        SurgeryError: one cannot be read, or they do not belong together.
    """
    base, (tuned,) = open_both(pre, ft)
    return pair(base, tuned)


def comparable(both: Pair) -> list[Matched]:
    """Return the floating-point tensors that both sides have, in the order of ft."""
    found = []
    for item in both.items:
        if item.pre is not None and item.ft.is_float:
            whole = item.pre.shape == item.ft.shape
            found.append(Matched(item, item.pre, item.ft if whole else item.ft.rows(0, item.pre.shape[0])))
    return found


def select(both: Pair, name: str) -> Matched:
    """Return the tensor of that name.

    Raises:
        OptionError: it is not in both sides, is empty, or holds no floating-point numbers.
    """
    tensors = comparable(both)
    found = next((tensor for tensor in tensors if tensor.ft.name == name), None)
    if found is not None and found.ft.entries:
        return found
    if name in both.ft.tensors:
        raise OptionError(
            f"{name}: there are no floating-point numbers to compare it with in {both.pre.folder}. Choose another."
        )
    near = difflib.get_close_matches(name, [tensor.ft.name for tensor in tensors], n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise OptionError(f"{name}: {both.ft.folder} has no tensor of that name.{hint}")


def measure(
    both: Pair,
    tensors: Sequence[Matched],
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Stream tensors of a pair and return the document that `surgery diff --json` prints.

    Args:
        workers: threads; by default one for each core, at most 8.
        advance: called now and then with the number of bytes read since.

    Raises:
        CheckpointError: a file ends early or cannot be read.
        OptionError: workers is below 1.
    """
    groups, found = _Groups(), dict[str, Measured]()

    def work(tick: Tick) -> Callable[[Matched], None]:
        chunks, bins = Chunks(tick), (np.zeros(BINS, np.int64), np.zeros(BINS, np.int64))

        def one(tensor: Matched) -> None:
            measured = _measure(tensor, chunks, bins)
            found[tensor.ft.name] = measured
            groups.add(tensor.item, measured)

        return one

    stream(sorted(tensors, key=lambda tensor: -tensor.nbytes), work, count_workers(workers), advance)
    before, notes = _before(both, tensors, found)
    lines = [_line(tensor, found[tensor.ft.name], before.get(tensor.ft.name)) for tensor in tensors]
    broken = [line["name"] for line in lines if line["delta_norm"] is None]
    if broken:
        notes.append(f"NaN or Inf: {', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''} have no norm.")
    layers = dict.fromkeys((line["stack"], line["layer"]) for line in lines if line["layer"] is not None)
    return {
        "pre": provenance.origin(both.pre),
        "ft": provenance.origin(both.ft),
        "versions": provenance.versions(),
        "notes": [*both.notes, *notes],
        "totals": _group(lines, groups.of(*(category for category in CATEGORIES if category in groups.parts))),
        "categories": {
            category: _group([line for line in lines if line["category"] == category], groups.of(category))
            for category in CATEGORIES
            if category in groups.parts
        },
        "layers": [
            {"stack": stack, "layer": layer, **_group(held, groups.of((stack, layer)))}
            for (stack, layer), held in _by_layer(lines, sorted(layers)).items()
        ],
        "tensors": lines,
    }


def tabled(path: Path) -> bool:
    """Whether a file begins as a table of `as_csv` does."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD


TABLE = Kind("table", (".csv",), tabled)


def as_csv(document: dict[str, Any]) -> bytes:
    """Return the tensors as CSV in UTF-8, one line each; an unknown number is an empty field."""
    lines = [_flat(line) for line in document["tensors"]]
    return csv_lines([*lines[:1], *(line.values() for line in lines)])


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """Return a tensor's line without dictionaries in it: {"delta": {"q50": 1}} becomes {"delta_q50": 1}."""
    flat = dict[str, Any]()
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{inner}": part for inner, part in value.items()}
        else:
            flat[name] = "x".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _measure(tensor: Matched, chunks: Chunks, bins: tuple[kernels.Counts, kernels.Counts]) -> Measured:
    for counts in bins:
        counts[:] = 0
    shift = sample_shift(tensor.ft.entries)
    parts = []
    with np.errstate(all="ignore"), tensor.pre.open() as pre, tensor.ft.open() as ft:
        sides = Sides(tensor.pre, tensor.ft, pre, ft)
        flat = plateau(sides, fapm.score)
        for start, base, tuned in chunks.read(sides):
            parts.append(kernels.compare(tensor.pre.dtype, base, tensor.ft.dtype, tuned, (start, shift), bins))
    delta, ratio = (Histogram.of(counts, shift) for counts in bins)
    return Measured(
        sum(part.same for part in parts),
        sum(part.infinite for part in parts),
        math.fsum(part.delta2 for part in parts),
        math.fsum(part.weight2 for part in parts),
        Distribution(delta, max((part.max_delta for part in parts), default=0.0)),
        Distribution(ratio, max((part.max_ratio for part in parts), default=0.0)),
        flat,
    )


def _line(tensor: Matched, measured: Measured, before: float | None) -> dict[str, Any]:
    """Return the entry of one tensor in the document; norms that are not finite are None."""
    place, entries = tensor.item.place, tensor.ft.entries
    delta_norm, weight_norm = _root(measured.delta2), _root(measured.weight2)
    return {
        "name": tensor.ft.name,
        "stack": place.stack,
        "layer": place.layer,
        "category": place.category,
        "dtype": tensor.ft.dtype,
        "shape": list(tensor.ft.shape),
        "entries": entries,
        "unchanged": measured.unchanged,
        "unchanged_share": measured.unchanged / entries if entries else None,
        "delta_norm": delta_norm,
        "weight_norm": weight_norm,
        "relative_norm": _ratio(delta_norm, weight_norm),
        "delta": measured.delta.as_json(),
        "ratio": measured.ratio.as_json(),
        "ratio_infinite": measured.infinite,
        "fapm_same": _shares(measured.fapm),
        "norm_before": before,
        "remaining": _ratio(delta_norm, before),
    }


def _group(lines: Sequence[dict[str, Any]], distributions: tuple[Distribution, Distribution]) -> dict[str, Any]:
    """Return the entry of a group of tensors in the document."""
    entries, unchanged = (sum(line[name] for line in lines) for name in ("entries", "unchanged"))
    edited = [line for line in lines if line["norm_before"] is not None]
    ratios = [line["relative_norm"] for line in lines if line["relative_norm"] is not None]
    return {
        "tensors": len(lines),
        "entries": entries,
        "unchanged": unchanged,
        "unchanged_share": unchanged / entries if entries else None,
        "relative_norm": _ratio(_norm(lines, "delta_norm"), _norm(lines, "weight_norm")),
        "distance": math.fsum(ratios) / len(ratios) if ratios else None,
        "delta": distributions[0].as_json(),
        "ratio": distributions[1].as_json(),
        "ratio_infinite": sum(line["ratio_infinite"] for line in lines),
        "fapm_same": _shares(mean(_prunable(lines))),
        "remaining": _ratio(_norm(edited, "delta_norm"), _norm(edited, "norm_before")),
    }


def _shares(same: Plateau | None) -> dict[str, float | None]:
    return {"start": same.start, "stop": same.stop} if same else {"start": None, "stop": None}


def _prunable(lines: Iterable[dict[str, Any]]) -> Iterable[Plateau]:
    """The shares of the tensors that FAPM prunes by default."""
    for line in lines:
        if len(line["shape"]) >= 2 and line["category"] in SCOPES["all"] and line["entries"]:
            yield Plateau(**line["fapm_same"], entries=line["entries"])


def _by_layer(
    lines: Iterable[dict[str, Any]], layers: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {layer: [] for layer in layers}
    for line in lines:
        if line["layer"] is not None:
            found[line["stack"], line["layer"]].append(line)
    return found


def _before(both: Pair, tensors: Sequence[Matched], found: dict[str, Measured]) -> tuple[dict[str, float], list[str]]:
    """Return ‖Δ‖ of each tensor before the edit, if surgery wrote ft, and a note if the report beside it cannot tell."""
    path = both.ft.folder / REPORT
    if not path.is_file():
        return {}, []
    try:
        told = read_json(path)
        if told.get("method") == "train":  # nothing was edited
            return {}, []
        lines = {line["name"]: line for line in told["tensors"]}
        before = dict[str, float]()
        for tensor in tensors:
            name = tensor.ft.name
            weight, now = _root(found[name].weight2), _root(found[name].delta2)
            was, became = lines[name]["distance_before"], lines[name]["distance_after"]
            if not weight or now is None or was is None or became is None:
                continue
            if not abs(now / weight - became) <= SAME * max(became, SAME):
                return {}, [f"{REPORT} beside ft tells of other weights than these: what remains is not shown."]
            before[name] = float(was) * weight
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
        return {}, [f"{REPORT} beside ft is damaged: what remains of the task vector is not shown."]
    return before, []


def _norm(lines: Iterable[dict[str, Any]], name: str) -> float | None:
    """Return the norm over all entries of several tensors; None if one of them is not finite."""
    norms = [line[name] for line in lines]
    return None if not norms or None in norms else math.hypot(*norms)


def _root(square: float) -> float | None:
    return math.sqrt(square) if math.isfinite(square) else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
