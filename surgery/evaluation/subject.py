"""A model to be scored, wherever its weights lie: a checkpoint, an adapter, a task vector, or an edit that was never written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.delta import FORMAT, open_delta
from surgery.checkpoint.formats.safetensors import read_header
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.listing import REPORT
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.readable import read_json
from surgery.checkpoint.source import Checkpoint, open_both, open_checkpoint
from surgery.checkpoint.tensor import Tensor, read_bytes
from surgery.editing import apply, report
from surgery.editing.edited import Edited
from surgery.editing.job import Job, beside
from surgery.editing.moved import moved
from surgery.errors import CheckpointError, OptionError
from surgery.methods import parameters
from surgery.paths import exists, expanded

Content = Path | Tensor | bytes


@dataclass(frozen=True)
class Subject:
    """One row of a comparison.

    Attributes:
        label: its name there.
        checkpoint: its weights.
        files: what lies beside them: name -> where its content is.
        method, parameters, command: how it was made, where that is known.
        recipe: all that its weights follow from, where they are computed from others: a key to their fingerprint.
        against: measures (distance D, effective sparsity) from pre; None where the subject is pre.
    """

    label: str
    checkpoint: Checkpoint
    files: Mapping[str, Content]
    method: str | None = None
    parameters: dict[str, Any] | None = None
    command: list[str] | None = None
    recipe: dict[str, Any] | None = field(default=None, kw_only=True, repr=False)
    against: Callable[[], tuple[float | None, float | None]] = field(default=lambda: (None, None), repr=False)

    def surroundings(self) -> str:
        """The SHA-256 of what lies beside the weights: scores depend on configuration and tokenizer."""
        digests = (f"{name} {hashlib.sha256(_content(kept)).hexdigest()}" for name, kept in sorted(self.files.items()))
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def lay_out(self, folder: Path) -> None:
        """Put the files beside the weights into an empty folder, for libraries that look for them there."""
        for name, kept in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(kept, Path):
                target.symlink_to(kept.absolute())
            else:
                target.write_bytes(_content(kept))

    def named(self, message: str, folder: Path) -> str:
        """A message about what `lay_out` put into a folder, with the user's own names for it."""
        for name, kept in self.files.items():
            if isinstance(kept, Path):
                message = message.replace(str(folder / name), str(kept))
        return message.replace(str(folder), self.checkpoint.source.typed)


def open_subject(typed: str, pre: Checkpoint | None, *, label: str | None = None) -> Subject:
    """Open a model by what the user typed, reading headers only.

    Args:
        typed: a folder, a file, a hub id with an optional `@revision`, an adapter, or a task vector of `surgery extract`.
        pre: the pre-trained model, which an adapter, a GGUF file or a task vector builds on, and from which a distance is
            measured; None where the model stands alone.
        label: its name; by default that of the folder or file.

    Raises:
        SurgeryError: it cannot be read.
    """
    path = expanded(typed)
    if (
        exists(path)
        and path.is_file()
        and path.suffix == ".safetensors"
        and read_header(path).metadata.get("format") == FORMAT
    ):
        if pre is None:
            raise CheckpointError(f"{path}: is a task vector, which is nothing without its base. Give pre.")
        return _from_delta(path, pre, label or path.stem)
    source = resolve(typed, companions=True)
    checkpoint, name = open_checkpoint(source, other=pre), label or Path(source.repo or path.absolute()).name
    return base_subject(checkpoint, name) if pre is None else tuned_subject(pair(pre, checkpoint), name)


def open_base(typed: str) -> Checkpoint:
    """Open a model that others build on, reading headers only.

    Raises:
        SurgeryError: it cannot be read.
    """
    return open_checkpoint(resolve(typed, companions=True))


def open_subjects(pre: str, ft: str, others: Sequence[str] = ()) -> list[Subject]:
    """The rows of a comparison, opened: pre, ft, and others.

    Args:
        others: as for `open_subject`; NAME=… gives a row its name.

    Raises:
        OptionError: two rows have one name.
        SurgeryError: one cannot be read.
    """
    base, (tuned,) = open_both(pre, ft)
    subjects = [base_subject(base), tuned_subject(pair(base, tuned))]
    labels = {"pre", "ft"}
    for typed in others:
        name, named, rest = typed.partition("=")
        named_row = bool(named) and not exists(Path(typed))
        subject = open_subject(rest if named_row else typed, base, label=name if named_row else None)
        if subject.label in labels:
            raise OptionError(f"{typed}: another row is named {subject.label} too. Give it a name: NAME={typed}.")
        labels.add(subject.label)
        subjects.append(subject)
    return subjects


def base_subject(pre: Checkpoint, label: str = "pre") -> Subject:
    """A model by itself: the pre-trained one.

    Raises:
        CheckpointError: it has no config.json.
    """
    return Subject(label, pre, beside(pair(pre, pre)))


def tuned_subject(both: Pair, label: str = "ft") -> Subject:
    """The fine-tuned model of a pair.

    Raises:
        CheckpointError: it has no config.json.
    """

    def against() -> tuple[float | None, float | None]:
        totals = report.as_json(report.summarize(moved(both.items)))
        return totals["distance_after"], totals["effective_sparsity"]

    return Subject(label, both.ft, beside(both), *_made(both.ft), against)


def edited_subject(
    job: Job, *, label: str | None = None, device: str = "auto", allow_nonfinite: bool = False
) -> Subject:
    """The checkpoint that an edit would write.

    Args:
        label: its name; by default the method's, with its main number.
    """
    edited = Edited(job, device, allow_nonfinite)

    def against() -> tuple[float | None, float | None]:
        totals = report.as_json(edited.totals)
        return totals["distance_after"], totals["effective_sparsity"]

    return Subject(
        label or job.method.title(),
        edited.checkpoint,
        {**job.copies, **job.changed},
        job.method.name,
        json.loads(json.dumps(parameters(job.method))),
        None,
        against,
    )


def _from_delta(path: Path, pre: Checkpoint, label: str) -> Subject:
    delta = open_delta(path)
    checkpoint, files = apply.computed(delta, pre)
    made = _object(delta.document.get("report"))
    totals = _object(made.get("totals"))
    known = _finite(totals.get("distance_after")), _finite(totals.get("effective_sparsity"))
    return Subject(label, checkpoint, files, *_described(made), lambda: known)


def _made(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any] | None, list[str] | None]:
    """The method, its parameters and the command by which surgery made a checkpoint, if it did."""
    path = checkpoint.folder / REPORT
    if checkpoint.source.file or not path.is_file():
        return None, None, None
    found = read_json(path)
    settings = found.get("settings")
    if isinstance(settings, dict):  # of a training
        return _text(settings.get("optim")), _numbers(settings), _words(found.get("command"))
    return _described(found)


def _described(report: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None, list[str] | None]:
    """Read an edit's report, which may hold anything."""
    return _text(report.get("method")), _numbers(report.get("parameters")), _words(report.get("command"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _numbers(value: Any) -> dict[str, Any] | None:
    """Parameters, if results.json can hold them: NaN and Inf are no JSON, but Python reads and writes them."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _words(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(word, str) for word in value) else None


def _content(kept: Content) -> bytes:
    if isinstance(kept, Path):
        return kept.read_bytes()
    return kept if isinstance(kept, bytes) else read_bytes(kept)
