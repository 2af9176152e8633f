"""Measure the spectrum of what fine-tuning changed (`surgery diff --ranks`), of each matrix that both models have.

    σ_1 ≥ σ_2 ≥ …     the singular values of Δ, by the smaller Gram matrix in float64 (`surgery.engines.spectral`)
    stable_rank       ‖Δ‖² / σ_1²: how many directions carry Δ; 1 for a single one
    energy_1, _k      the share of ‖Δ‖² in the first, and in the first k, singular values
    intruders         of the k leading left singular vectors of ft's matrix, those whose largest |cosine| with any of pre's is
                      under epsilon (arXiv 2410.21228)

Experts stacked in one tensor are a matrix each: their line has the means, and the sum of the intruders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from surgery import provenance
from surgery.checkpoint.pair import Pair
from surgery.diff.measure import Matched
from surgery.diff.measure import as_csv as table
from surgery.engines.chunks import Sides
from surgery.engines.spectral import Blocks, OnProcessor, intruders, of_task_vector, one_at_a_time
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.engines.worker import Worker
from surgery.errors import OptionError
from surgery.layout import CATEGORIES, module, place
from surgery.methods.intruder import EPSILON, K
from surgery.methods.scope import is_stacked
from surgery.paths import Kind

PASSES = 3  # over both files: Δ's Gram matrix, those of pre and ft, and their vectors
POINTS = 64  # of a spectrum in the document, evenly spaced in its logarithm
HEAD = b"name,stack,layer,category,module,shape,matrices,"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The spectrum of one matrix of Δ; all None where it holds NaN or Inf, or, but for the intruders, where Δ = 0."""

    values: list[float]
    stable_rank: float | None
    energy_1: float | None
    energy_k: float | None
    intruders: int | None


def tabled(path: Path) -> bool:
    """Whether a file begins as the table of these lines does."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD


TABLE = Kind("table", (".csv",), tabled)


def matrices(tensors: Sequence[Matched]) -> list[Matched]:
    """Those that are matrices, or experts that are one each.

    Raises:
        OptionError: there is none.
    """
    found = [one for one in tensors if (len(one.ft.shape) == 2 or is_stacked(one.item)) and one.ft.entries]
    if not found:
        raise OptionError(f"{tensors[0].ft.name if tensors else 'The pair'} has no matrix: leave `ranks` out.")
    return found


def measure(
    both: Pair,
    tensors: Sequence[Matched],
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Stream matrices of a pair and return the document that `surgery diff --ranks --json` prints.

    Args:
        tensors: of `matrices`.
        workers, advance: as for `surgery.diff.measure.measure`.

    Raises:
        CheckpointError: a file ends early or cannot be read.
        OptionError: workers is below 1.
    """
    found: dict[str, list[Ranks]] = {}

    def work(tick: Tick) -> Callable[[Matched], None]:
        worker = Worker(tick)

        def one(tensor: Matched) -> None:
            found[tensor.ft.name] = _measure(tensor, worker)

        return one

    stream(sorted(tensors, key=lambda tensor: -tensor.nbytes), work, count_workers(workers), advance)
    lines = [_line(tensor, found[tensor.ft.name]) for tensor in tensors]
    lines.sort(key=lambda line: (place(line["name"]).side == "output", CATEGORIES.index(line["category"])))
    broken = [line["name"] for line in lines if line["intruders"] is None]
    notes = [f"NaN or Inf: {', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''} have no spectrum."]
    return {
        "pre": provenance.origin(both.pre),
        "ft": provenance.origin(both.ft),
        "versions": provenance.versions(),
        "notes": [*both.notes, *(notes if broken else [])],
        "k": K,
        "epsilon": EPSILON,
        "tensors": lines,
    }


def as_csv(document: dict[str, Any]) -> bytes:
    """Return the matrices as CSV in UTF-8, one line each, without their spectra."""
    lines = [{name: value for name, value in line.items() if name != "spectrum"} for line in document["tensors"]]
    return table({"tensors": lines})


def _measure(tensor: Matched, worker: Worker) -> list[Ranks]:
    with np.errstate(all="ignore"), tensor.pre.open() as pre, tensor.ft.open() as ft:
        sides = Sides(tensor.pre, tensor.ft, pre, ft)
        parts = [sides] if len(tensor.ft.shape) == 2 else [sides.rows(at, at + 1) for at in range(tensor.ft.shape[0])]
        return [_ranks(Blocks(worker, part, OnProcessor())) for part in parts]


def _ranks(blocks: Blocks) -> Ranks:
    with one_at_a_time:
        spectrum, leading = of_task_vector(blocks), intruders(blocks, K)
    if spectrum is None or leading is None:
        return Ranks([], None, None, None, None)
    count = int(np.count_nonzero(leading.cosines < EPSILON))
    squares = spectrum.values**2
    if not squares[0]:
        return Ranks([], None, None, None, count)
    total = float(squares.sum())
    return Ranks(
        spectrum.values.tolist(),
        total / float(squares[0]),
        float(squares[0]) / total,
        float(squares[:K].sum()) / total,
        count,
    )


def _line(tensor: Matched, ranks: Sequence[Ranks]) -> dict[str, Any]:
    where, held = tensor.item.place, [one for one in ranks if one.stable_rank is not None]

    def mean(name: str) -> float | None:
        return fmean(getattr(one, name) for one in held) if held else None

    counted = [one.intruders for one in ranks if one.intruders is not None]
    return {
        "name": tensor.ft.name,
        "stack": where.stack,
        "layer": where.layer,
        "category": where.category,
        "module": module(tensor.ft.name),
        "shape": list(tensor.ft.shape),
        "matrices": len(ranks),
        "stable_rank": mean("stable_rank"),
        "energy_1": mean("energy_1"),
        "energy_k": mean("energy_k"),
        "intruders": sum(counted) if len(counted) == len(ranks) else None,
        "spectrum": _thinned(np.mean([one.values for one in held], axis=0)) if held else [],
    }


def _thinned(values: Any) -> list[list[float]]:
    """[number from 1, singular value] at some numbers, the first and the last among them."""
    at = np.unique(np.geomspace(1, len(values), POINTS).round().astype(int))
    return [[int(number), float(values[number - 1])] for number in at]
