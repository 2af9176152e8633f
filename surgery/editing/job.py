"""Prepare a run before any work: open, pair, plan and check everything that headers tell."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery import native, provenance
from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import MAX_SHARD_SIZE, Container, split
from surgery.checkpoint.output import check_output
from surgery.checkpoint.pair import Pair, in_form, likes, pair
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.source import Checkpoint, open_both
from surgery.checkpoint.tied import CONFIG, untied
from surgery.errors import CheckpointError, OptionError
from surgery.methods import METHODS, Method, parameters
from surgery.methods.actions import Draw, KeepSalient, Merge, Prune, PruneRows, Shrink, Soften, Step

QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Job:
    """A planned run, checked as far as headers allow.

    Attributes:
        steps: one for each tensor of ft, in the order of ft's files.
        container: how the output's files are cut.
        out: the output folder.
        replace: a checkpoint that is there may be replaced.
        copies: ft's files that travel with its weights: name in the output -> path.
        changed: those of them whose content must change: name -> content.
        others: further fine-tuned models, for a merge.
        nbytes: the size of the output's weights.
        reading: bytes that will be read, for the progress bar.
    """

    pair: Pair
    method: Method
    steps: list[Step]
    container: Container
    out: Path
    replace: bool
    copies: dict[str, Path]
    changed: dict[str, bytes]
    others: tuple[Checkpoint, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(step.ft.nbytes for step in self.steps)

    @property
    def reading(self) -> int:
        return sum(reading(step) for step in self.steps)

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that must not be written to."""
        return [path for checkpoint in (self.pair.pre, self.pair.ft, *self.others) for path in _inputs(checkpoint)]


def prepare(
    pre: str | Path,
    ft: str | Path | Sequence[str | Path],
    method: Method,
    *,
    out: Path | None = None,
    force: bool = False,
    strict: bool = False,
    max_shard_size: str | None = None,
    label: str | None = None,
) -> Job:
    """Open a pair, plan the edit and check the output, reading headers only.

    Args:
        pre, ft, method, strict, max_shard_size: as for `plan`.
        out: the output folder; by default a sibling of ft named after the method.
        label: what the default output is named after in place of the method and its number.
        force: an existing checkpoint at `out` may be replaced.

    Raises:
        SurgeryError: anything that can be refused before working.
    """
    job = plan(pre, ft, method, strict=strict, max_shard_size=max_shard_size)
    default = _default_out(job.pair.ft, label) if label else job.out
    return replace(job, out=check_output(out or default, job.inputs, force=force), replace=force)


def plan(
    pre: str | Path,
    ft: str | Path | Sequence[str | Path],
    method: Method,
    *,
    strict: bool = False,
    max_shard_size: str | None = None,
) -> Job:
    """Open a pair and plan the edit, reading headers only. The output is the default one, and not checked.

    Args:
        pre, ft: folders, files, or hub ids with an optional `@revision`. A merge takes several fts, the first of which gives the
            container and every tensor that is not merged.
        method: with its parameters.
        strict: refuse a pair whose tensors or vocabularies do not match one to one.
        max_shard_size: cut the output anew into files of at most this size, such as "5GB"; by default as ft is cut, or at 5 GB
            where ft is in another format than safetensors.

    Raises:
        SurgeryError: anything that can be refused before working.
    """
    names = [ft] if isinstance(ft, (str, Path)) else ft
    if len(names) > 1 and not method.merges:
        several = " and ".join(one.name for one in METHODS.values() if one.merges)
        raise OptionError(f"{method.name} takes one `ft`, not {len(names)}: {several} merge several.")
    base, (tuned, *others) = open_both(str(pre), *map(str, names))
    both = pair(base, tuned, strict=strict)
    return plan_pair(both, method, others, strict=strict, max_shard_size=max_shard_size)


def plan_pair(
    both: Pair,
    method: Method,
    others: Sequence[Checkpoint] = (),
    *,
    strict: bool = False,
    max_shard_size: str | None = None,
) -> Job:
    """Plan the edit of a pair that is open; see `plan`.

    Args:
        others: further fine-tuned models, for a merge.
    """
    base, tuned = both.pre, both.ft
    actions = method.actions(both.items)
    container = tuned.container
    if container is None or max_shard_size is not None:
        container = split(tuned.tensors, MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    copies = _copies(base, tuned)
    changed = _configured(copies, both)
    steps = [Step(item.ft, item.pre, item.place, action) for item, action in zip(both.items, actions, strict=True)]
    merged = {step.ft.name for step in steps if isinstance(step.action, Merge)}
    further = [likes(both, pair(base, in_form(other, tuned), strict=strict), merged) for other in others]
    steps = [
        replace(step, others=tuple(found[step.ft.name] for found, _ in further)) if step.ft.name in merged else step
        for step in steps
    ]
    both.notes.extend(note for _, notes in further for note in notes)
    if not (base if tuned.borrows else tuned).quantized:
        both.notes.extend(_leftover(copies))
    return Job(
        both,
        method,
        _tied(both, method, steps),
        container,
        _default_out(tuned, method.title()),
        False,
        copies,
        changed,
        tuple(others),
    )


def replan(job: Job, method: Method) -> Job:
    """The same job with other parameters of its method, on the tensors that were paired.

    Raises:
        OptionError: the parameters do not fit this model.
    """
    actions = method.actions(job.pair.items)
    steps = [replace(step, action=action) for step, action in zip(job.steps, actions, strict=True)]
    return replace(job, method=method, steps=_tied(job.pair, method, steps))


def _tied(both: Pair, method: Method, steps: list[Step]) -> list[Step]:
    """The steps, with the same edit for an embedding and the head that is tied to it, where both are stored.

    Both get what the embedding gets; with a calibration, which knows the input of the head alone, what the head gets.
    """
    if both.tied is None:
        return steps
    embedding, head = both.tied
    leader, follower = (head, embedding) if method.calibrated else (embedding, head)
    source = next(step for step in steps if step.ft.name == leader)
    action = source.action
    if isinstance(action, Merge) and not isinstance(action.keeps, Prune):
        action = replace(action, keeps=partial(_drawn_for, action.keeps, leader))
    return [
        replace(step, pre=source.pre, action=action, others=source.others) if step.ft.name == follower else step
        for step in steps
    ]


def _drawn_for(draw: Draw, name: str, _: str, number: int, start: int, count: int) -> Any:
    """The draw of another tensor."""
    return draw(name, number, start, count)


def beside(both: Pair) -> dict[str, Path | bytes]:
    """Return what a loader needs beside the weights, from ft, or from pre if ft's format has none: name -> file or content.

    Raises:
        CheckpointError: config.json is missing or damaged.
    """
    copies = _copies(both.pre, both.ft)
    return {**copies, **_configured(copies, both)}


def _copies(pre: Checkpoint, ft: Checkpoint) -> dict[str, Path]:
    """Return the paths of the files that a loader needs beside the weights: ft's, or pre's if ft's format has none."""
    found = companions(ft.folder, only_known=ft.source.file is not None)
    if ft.borrows:
        found = companions(pre.folder, only_known=pre.source.file is not None) | found
    if CONFIG not in found:
        raise CheckpointError(f"{ft.folder}: config.json is missing, so nothing could load the result. Copy it there.")
    return found


def _configured(copies: Mapping[str, Path], both: Pair) -> dict[str, bytes]:
    """config.json as it must be beside the output's weights, if that is not as it is.

    Where it is pre's, it gets the size of ft's vocabulary. A head that is no longer tied is said to be so, and a quantization is
    left out: what is written are plain numbers.
    """
    config = read_json(copies[CONFIG])
    made = _resized(config, both) if both.ft.borrows else config
    made = untied(made) if both.parted else made
    made = _plain(made)
    return {} if made == config else {CONFIG: (json.dumps(made, indent=2) + "\n").encode()}


def _resized(config: dict[str, Any], both: Pair) -> dict[str, Any]:
    sizes = {
        both.pre.tensors[item.pre.name].shape[0]: item.ft.shape[0]
        for item in both.items
        if item.pre is not None and item.place.category == "embedding" and item.ft.shape
    }

    def renew(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: sizes.get(inner, inner) if key == "vocab_size" and isinstance(inner, int) else renew(inner)
            for key, inner in value.items()
        }

    renewed: dict[str, Any] = renew(config)
    return renewed


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its quantization, in its parts too."""
    return {
        key: _plain(value) if isinstance(value, dict) else value for key, value in config.items() if key != QUANTIZATION
    }


def _leftover(copies: Mapping[str, Path]) -> list[str]:
    """A note where config.json speaks of a quantization, though every weight is a plain number."""
    config = read_json(copies[CONFIG])
    if _plain(config) == config:
        return []
    about = config.get(QUANTIZATION)
    name = about.get("quant_method", "some") if isinstance(about, dict) else "some"
    return [
        f"{copies[CONFIG]}: names a quantization ({name}) of weights that are plain numbers: left out of the output's."
    ]


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    """Return a checkpoint's folder and files, and the targets of its links, such as the hub's cache."""
    if checkpoint.source.file:
        return list(checkpoint.files.values())
    return [checkpoint.folder, *sorted(checkpoint.folder.iterdir()), *checkpoint.files.values()]


def reading(step: Step) -> int:
    """Return the number of bytes that a step reads, over all its passes."""
    base = step.pre.nbytes if step.pre else 0
    if isinstance(step.action, Prune):  # for the mean, for the thresholds, for the output
        passes = 3 if step.action.top else 2
        return passes * (step.ft.nbytes + base) + (base if step.action.uses_mean else 0)
    if isinstance(step.action, PruneRows) and (step.action.transposed or step.action.whole):
        return 2 * (step.ft.nbytes + base)
    if isinstance(step.action, KeepSalient):  # for the weights, for a sample, for the quartiles, for the output
        return 4 * (step.ft.nbytes + base)
    if isinstance(step.action, Shrink | Soften):  # for the Gram matrix, for the other side's vectors, for the output
        tall = isinstance(step.action, Shrink) and step.ft.shape[-2] >= step.ft.shape[-1]
        return (2 if tall else 3) * (step.ft.nbytes + base)
    if isinstance(step.action, Merge):
        once = step.ft.nbytes + base + sum(other.nbytes for other in step.others)
        return once + (once + len(step.others) * base if isinstance(step.action.keeps, Prune) else 0)
    return step.ft.nbytes + base


def _default_out(ft: Checkpoint, label: str) -> Path:
    if ft.source.repo:
        return Path(f"{ft.source.repo.split('/')[-1]}-{label}")
    path = Path(os.path.realpath(ft.source.folder / (ft.source.file or "")))
    return path.with_name(f"{path.stem if ft.source.file else path.name}-{label}")


def identity(job: Job, allow_nonfinite: bool, device: str, command: Sequence[str]) -> dict[str, Any]:
    """Return everything that must not change between a run and its resumption."""
    return {
        "version": provenance.versions()["surgery"],
        **stamps(job),
        "method": job.method.name,
        "options": {**parameters(job.method), "allow_nonfinite": allow_nonfinite, "device": device},
        "kernels": "C" if native.compiled else "numpy",
        "command": _repeatable(command),
    }


def _repeatable(command: Sequence[str]) -> list[str]:
    """A command line as a single run that is not resumed has it."""
    words = [word for word in command if word != "--resume" and not word.startswith("--part=")]
    return [word for before, word in zip(["", *words], words, strict=False) if "--part" not in (before, word)]


def stamps(job: Job) -> dict[str, dict[str, list[Any]]]:
    """Return for each input ("pre", "ft", "ft 2", …) a stamp that shows whether its files changed, without reading them."""
    checkpoints = {"pre": job.pair.pre, "ft": job.pair.ft}
    checkpoints |= {f"ft {number}": other for number, other in enumerate(job.others, start=2)}
    return {side: _stamp(checkpoint) for side, checkpoint in checkpoints.items()}


def check_unchanged(job: Job, before: Mapping[str, Any]) -> None:
    """Compare the inputs with the stamps that were taken before the work.

    Raises:
        CheckpointError: a file changed since.
    """
    checkpoints = (job.pair.pre, job.pair.ft, *job.others)
    for checkpoint, (side, stamp) in zip(checkpoints, stamps(job).items(), strict=True):
        if stamp != before[side]:
            raise CheckpointError(f"{checkpoint.folder}: its files changed while surgery read them. Run it again.")


def _stamp(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Size and time of each file, and a digest of what it holds."""
    found: dict[str, list[Any]] = {}
    for name, path in checkpoint.files.items():
        status = path.stat()
        found[name] = [status.st_size, status.st_mtime_ns]
    layout = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.start) for tensor in checkpoint.tensors.values())
    return found | {"tensors": [hashlib.sha256(repr(layout).encode()).hexdigest()]}
