"""Check a checkpoint that surgery wrote: against its own report, and against the two models that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.delta import as_words, read_entries
from surgery.checkpoint.dtypes import BITS, RAW
from surgery.checkpoint.formats import adapter
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.hub import Source, resolve
from surgery.checkpoint.listing import REPORT
from surgery.checkpoint.pair import pair
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.source import open_both, open_checkpoint, weights_of
from surgery.checkpoint.tensor import Tensor
from surgery.engines import kernels
from surgery.engines.chunks import CHUNK
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.errors import CheckpointError, PairError
from surgery.paths import expanded

# Each entry of these is a stored number of one of the two models.
SELECTED = ("kept", "reset", "pruned", "copied")
FIELDS = ("name", "dtype", "shape", "action", "entries", "kept", "pruned", "differ", "checksum")


@dataclass(frozen=True, slots=True)
class Check:
    """A tensor of the checkpoint, its line of the report, and its inputs, if those were given."""

    tensor: Tensor
    line: dict[str, Any]
    pre: Tensor | None
    ft: Tensor | None

    @property
    def reading(self) -> int:
        return sum(part.nbytes for part in (self.tensor, self.pre, self.ft) if part is not None)


def prepare(folder: Path, pre: str | None, ft: str | None) -> list[Check]:
    """Open a checkpoint that surgery wrote and compare its headers with its report.

    Args:
        folder: the checkpoint.
        pre, ft: the models that it was made from, both or neither.

    Raises:
        CheckpointError: it is damaged, has no report, or holds other tensors than the report says.
        PairError: pre and ft are not the models that it was made from.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a checkpoint that surgery wrote.")
    source = resolve(str(folder), companions=False)
    tensors, lines = stored(source), _lines(source.folder / REPORT)
    for name in tensors:
        if name not in lines:
            raise CheckpointError(f"{source.folder}: holds tensor {name}, which its report does not know.")
    for name, line in lines.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{source.folder}: lacks tensor {name}, which its report lists.")
        if [tensor.dtype, *tensor.shape] != [line["dtype"], *line["shape"]]:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, and the report says {line['dtype']} "
                f"{line['shape']}."
            )
    bases, tuned = _inputs(pre, ft)
    if tuned and tuned.keys() != lines.keys():
        odd = next(iter(tuned.keys() ^ lines.keys()))
        raise PairError(f"{ft}: is not what {folder} was made from: tensor {odd} is in one of them only.")
    return [Check(tensor, lines[name], bases.get(name), tuned.get(name)) for name, tensor in tensors.items()]


def stored(source: Source) -> dict[str, Tensor]:
    """Return the tensors in a checkpoint's own files: of a LoRA adapter, its factors."""
    choice = weights_of(source)
    if choice.format == adapter.NAME:
        return read_header(source.folder / choice.files[1]).tensors
    return open_checkpoint(source).tensors


def run(checks: list[Check], *, workers: int | None = None, advance: Callable[[int], None] = lambda _: None) -> None:
    """Read every tensor and compare it.

    Raises:
        CheckpointError: the first tensor, in the order of the checkpoint, that is not as the report says.
    """
    wrong: dict[str, str] = {}

    def work(tick: Tick) -> Callable[[Check], None]:
        def do(check: Check) -> None:
            fault = _fault(check, tick)
            if fault:
                wrong[check.tensor.name] = fault

        return do

    stream(sorted(checks, key=lambda check: -check.reading), work, count_workers(workers), advance)
    for check in checks:
        if check.tensor.name in wrong:
            others = f"; {len(wrong) - 1} more tensors are wrong" if len(wrong) > 1 else ""
            raise CheckpointError(
                f"{check.tensor.path}: tensor {check.tensor.name} {wrong[check.tensor.name]}{others}."
            )


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        raise CheckpointError(f"{path}: is missing, so surgery did not write this checkpoint, or it is not complete.")
    report = read_json(path)
    tensors = report.get("tensors")
    if not isinstance(tensors, list) or not all(
        isinstance(line, dict) and line.keys() >= set(FIELDS) for line in tensors
    ):
        raise CheckpointError(f"{path}: is not a report of this version of surgery.")
    return {line["name"]: line for line in tensors}


def _inputs(pre: str | None, ft: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if pre is None or ft is None:
        return {}, {}
    base, (tuned,) = open_both(pre, ft)
    items = pair(base, tuned).items
    return {item.ft.name: item.pre for item in items if item.pre is not None}, {item.ft.name: item.ft for item in items}


def _fault(check: Check, tick: Tick) -> str | None:
    """Return what is wrong with a tensor, or None."""
    tensor, line = check.tensor, check.line
    if check.ft is not None and (check.ft.dtype, check.ft.shape) != (tensor.dtype, tensor.shape):
        return f"is {check.ft.dtype} {list(check.ft.shape)} in ft"
    checksum, counts = Checksum(), _Counts()
    with ExitStack() as stack:
        reader = stack.enter_context(tensor.open())
        base = stack.enter_context(check.pre.open()) if check.pre is not None and tensor.is_float else None
        tuned = stack.enter_context(check.ft.open()) if check.ft is not None else None
        for start in range(0, tensor.entries, CHUNK):
            count = min(CHUNK, tensor.entries - start)
            raw = read_entries(reader, start, count)
            checksum.add(start * BITS[tensor.dtype] // 8, raw)
            tick(len(raw))
            out = np.frombuffer(raw, f"u{BITS[tensor.dtype] // 8}")
            of_ft = of_pre = np.zeros(count, np.bool_)
            if tuned is not None:
                of_ft = out == np.frombuffer(read_entries(tuned, start, count), out.dtype)
            if base is not None:
                shared = max(min(count, base.tensor.entries - start), 0)
                stored = read_entries(base, start, shared)
                of_pre = np.zeros(count, np.bool_)
                of_pre[:shared] = out[:shared] == as_words(stored, base.tensor.dtype, tensor.dtype)
                counts.differ += count - shared
                if shared:
                    raw_pre = np.frombuffer(stored, RAW[base.tensor.dtype])
                    view = out[:shared].view(RAW[tensor.dtype])
                    counts.differ += kernels.distance(base.tensor.dtype, raw_pre, tensor.dtype, view).differ
            counts.of_ft += int(np.count_nonzero(of_ft))
            counts.of_pre += int(np.count_nonzero(of_pre))
            counts.of_neither += int(np.count_nonzero(~(of_ft | of_pre)))
    if checksum.text() != line["checksum"]:
        return "has another checksum than the report: it was damaged or changed"
    return _wrong_counts(check, counts) if check.ft is not None else None


@dataclass(slots=True)
class _Counts:
    of_ft: int = 0
    of_pre: int = 0
    of_neither: int = 0
    differ: int = 0


def _wrong_counts(check: Check, counts: _Counts) -> str | None:
    line = check.line
    if line["action"] in SELECTED and counts.of_neither:
        return f"has {counts.of_neither:,} entries that are neither pre's nor ft's"
    if line["kept"] is not None and line["kept"] > counts.of_ft:
        return f"has {counts.of_ft:,} entries of ft, and the report says {line['kept']:,} were kept"
    if line["pruned"] is not None and line["action"] in SELECTED and line["pruned"] > counts.of_pre:
        return f"has {counts.of_pre:,} entries of pre, and the report says {line['pruned']:,} went back"
    if line["differ"] is not None and line["differ"] != counts.differ:
        return f"differs from pre in {counts.differ:,} entries, and the report says {line['differ']:,}"
    return None
