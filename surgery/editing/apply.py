"""Put a task vector back on its base: the checkpoint that the method would have written, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from surgery import provenance
from surgery.checkpoint.checksum import Checksum
from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import Container, Shard
from surgery.checkpoint.delta import FILE, Delta, as_words, open_delta, read_entries
from surgery.checkpoint.draft import Draft
from surgery.checkpoint.dtypes import BITS, Array
from surgery.checkpoint.durable import explain
from surgery.checkpoint.formats import FORMATS, safetensors
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.output import check_output
from surgery.checkpoint.readable import parse_json
from surgery.checkpoint.regroup import regroup
from surgery.checkpoint.source import Checkpoint, open_checkpoint, weights_of
from surgery.checkpoint.tensor import Computed, Sink, Span, Tensor, read_bytes
from surgery.checkpoint.tied import CONFIG, config_of
from surgery.editing.run import documents
from surgery.engines.chunks import CHUNK
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.errors import CheckpointError, PairError
from surgery.paths import expanded

# Tensors up to this size are compared with the base that is meant before anything is written.
QUICK_BYTES, QUICK_TENSORS = 1 << 20, 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write: its entry in the delta, its base, and the parts that the delta stores."""

    line: dict[str, Any]
    result: Tensor
    base: Tensor | None
    mask: Tensor | None
    kept: Tensor | None
    whole: Tensor | None

    @property
    def reading(self) -> int:
        return sum(part.nbytes for part in (self.base, self.mask, self.kept, self.whole) if part is not None)


@dataclass(frozen=True)
class ApplyJob:
    """A checkpoint to restore, checked as far as headers and small tensors allow."""

    delta: Delta
    base: Checkpoint
    pieces: list[Piece]
    container: Container
    files: dict[str, Path | Tensor]
    out: Path
    force: bool

    @property
    def nbytes(self) -> int:
        return sum(piece.result.nbytes for piece in self.pieces)

    @property
    def reading(self) -> int:
        return sum(piece.reading for piece in self.pieces)


def prepare(pre: str | Path, delta: Path, *, out: Path | None = None, force: bool = False) -> ApplyJob:
    """Open a base and a task vector, and check that they belong together and the output.

    Args:
        pre: a folder, a file, or a hub id with an optional `@revision`.
        delta: a file that `surgery extract` wrote.
        out: the output folder; by default beside the delta, named after it.
        force: take another base than that of the extraction, and replace an earlier output of surgery at `out`.

    Raises:
        CheckpointError: the delta is damaged.
        PairError: the base is another one, and `force` is not given.
    """
    delta = expanded(delta)
    opened = open_delta(delta)
    source = resolve(str(pre), companions=True)
    base = open_checkpoint(
        source, other=_names(source, opened) if FORMATS[weights_of(source).format].needs_base else None
    )
    pieces = _pieces(opened, base, check=not force)
    container = _container(opened)
    target = out or delta.with_suffix("")
    inputs = [base.folder, *base.files.values(), delta] if not base.source.file else [*base.files.values(), delta]
    return ApplyJob(
        opened, base, pieces, container, _files(opened, base, force), check_output(target, inputs, force=force), force
    )


def run(
    job: ApplyJob,
    *,
    workers: int | None = None,
    command: Sequence[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint and return its report: the one that came with the task vector, with this command.

    Raises:
        PairError: the base turns out to be another one; nothing is left behind.
        SurgeryError: the output or its disk; nothing is left behind.
    """
    results = {piece.result.name: piece.result for piece in job.pieces}
    shards = {
        name: ([results[tensor] for tensor in shard.names], shard.metadata)
        for name, shard in job.container.shards.items()
    }
    checksums: dict[str, str] = {}
    copies = {name: content for name, content in job.files.items() if isinstance(content, Path)}
    stored = {name: read_bytes(content) for name, content in job.files.items() if isinstance(content, Tensor)}
    identity = {"delta": str(job.delta.path), "command": list(command)}
    with Draft(job.out, shards, identity, resume=False, replace=job.force) as draft:

        def work(tick: Tick) -> Callable[[Piece], None]:
            def do(piece: Piece) -> None:
                sink = draft.sink(piece.result.name)
                base = _write(piece, sink, tick)
                if not job.force and piece.base is not None and base != piece.line["base"]["checksum"]:
                    raise _another_base(piece, job.delta, job.base)
                checksums[piece.result.name] = sink.checksum.text()
                draft.finish(piece.result.name, {})

            return do

        try:
            stream(sorted(job.pieces, key=lambda piece: -piece.reading), work, count_workers(workers), advance)
        except OSError as error:
            raise explain(error, job.out) from error
        document = _report(job, checksums, command)
        draft.commit(documents(document, job.container) | stored, copies, document)
    document["notes"].extend(draft.left)
    return document


def computed(delta: Delta, base: Checkpoint) -> tuple[Checkpoint, dict[str, Path | Tensor]]:
    """Return the checkpoint that `run` would write, made while it is read, and the files beside its weights.

    Raises:
        PairError: the base is another one, as far as small tensors can tell; reading a tensor tells for the others.
        CheckpointError: a file beside the base's weights is not the one that is meant.
    """
    tensors = {
        piece.result.name: replace(
            piece.result, data=Computed(delta.path, piece.result.nbytes, partial(_make, piece, delta, base))
        )
        for piece in _pieces(delta, base, check=True)
    }
    made = Checkpoint(base.source, safetensors.NAME, tensors, {delta.path.name: delta.path}, _container(delta))
    return made, _files(delta, base, False)


def _make(piece: Piece, delta: Delta, base: Checkpoint, sink: Sink) -> None:
    checksum = _write(piece, sink, lambda _: None)
    if piece.base is not None and checksum != piece.line["base"]["checksum"]:
        raise _another_base(piece, delta, base)


def _pieces(delta: Delta, base: Checkpoint, *, check: bool) -> list[Piece]:
    bases = {**base.tensors, **_regrouped(delta, base)}
    pieces = [_piece(line, delta, base, bases) for line in delta.document["tensors"]]
    if check:
        small = [piece for piece in pieces if piece.base is not None and piece.base.nbytes <= QUICK_BYTES]
        for piece in small[:QUICK_TENSORS]:
            _quick_check(piece, delta, base)
    return pieces


def _container(delta: Delta) -> Container:
    shards = delta.document["shards"]
    return Container(
        {name: Shard(tuple(shard["names"]), shard["metadata"]) for name, shard in shards.items()},
        delta.document["index"],
    )


def _names(source: Any, delta: Delta) -> Checkpoint:
    """Return a checkpoint with the names and shapes of the original base, by which those in a GGUF file are found."""
    tensors = {tensor.name: tensor for tensor in _bases(delta)}
    return Checkpoint(source, safetensors.NAME, tensors, {}, None)


def _regrouped(delta: Delta, base: Checkpoint) -> dict[str, Tensor]:
    """Return the bases that ft has stacked or fused otherwise than the base, by the names in ft."""
    wanted = _bases(delta)
    fitting = {tensor.name for tensor in wanted if _fits(base.tensors.get(tensor.name), tensor)}
    if len(fitting) == len(wanted):
        return {}
    stored = delta.parts.get(FILE + CONFIG)
    config = config_of(base.folder)
    tuned = config if stored is None else parse_json(read_bytes(stored), delta.path)
    others = [tensor for name, tensor in base.tensors.items() if name not in fitting]
    return regroup(others, [tensor for tensor in wanted if tensor.name not in fitting], config, tuned).base


def _bases(delta: Delta) -> list[Tensor]:
    """Return the tensors of the original base: names, types and shapes, without their numbers."""
    return [
        Tensor(line["base"]["name"], line["base"]["dtype"], tuple(line["base"]["shape"]), Span(delta.path, 0))
        for line in delta.document["tensors"]
        if line["base"]
    ]


def _fits(found: Tensor | None, wanted: Tensor) -> bool:
    """Return whether a tensor may be the base: it has as many rows at least, and all else is alike."""
    return (
        found is not None
        and found.dtype == wanted.dtype
        and found.shape[1:] == wanted.shape[1:]
        and len(found.shape) == len(wanted.shape)
        and not (wanted.shape and found.shape[0] < wanted.shape[0])
    )


def _piece(line: dict[str, Any], delta: Delta, base: Checkpoint, bases: Mapping[str, Tensor]) -> Piece:
    name, shape = line["name"], tuple(line["shape"])
    result = Tensor(name, line["dtype"], shape, Span(delta.path, 0))
    mask, kept, whole = (delta.parts.get(f"{name}:{kind}") for kind in ("mask", "kept", "whole"))
    recorded = line["base"]
    if recorded is None:
        return Piece(line, result, None, None, None, whole)
    found = bases.get(recorded["name"])
    wanted = Tensor(recorded["name"], recorded["dtype"], tuple(recorded["shape"]), Span(delta.path, 0))
    if found is None or not _fits(found, wanted):
        has = f"{found.dtype} {list(found.shape)}" if found else "none"
        raise PairError(
            f"{base.folder}: is not the base of {delta.path}, which needs {recorded['name']} as {recorded['dtype']} "
            f"{list(wanted.shape)} and finds {has}. Give {delta.metadata['base']}."
        )
    return Piece(line, result, found.rows(0, wanted.shape[0]) if wanted.shape else found, mask, kept, whole)


def _quick_check(piece: Piece, delta: Delta, base: Checkpoint) -> None:
    assert piece.base is not None
    checksum = Checksum()
    with piece.base.open() as reader:
        checksum.add(0, read_entries(reader, 0, piece.base.entries))
    if checksum.text() != piece.line["base"]["checksum"]:
        raise _another_base(piece, delta, base)


def _another_base(piece: Piece, delta: Delta, base: Checkpoint) -> PairError:
    revision = delta.metadata.get("revision")
    meant = delta.metadata["base"] + (f"@{revision}" if revision else "")
    return PairError(
        f"{base.folder}: is not the base of {delta.path}: its {piece.line['base']['name']} has another checksum. Give {meant}, "
        "or apply it all the same with `force`."
    )


def _files(delta: Delta, base: Checkpoint, force: bool) -> dict[str, Path | Tensor]:
    """List the files beside the weights: those that the delta brings, and those of the base that are the ones meant."""
    own = companions(base.folder, only_known=base.source.file is not None)
    found: dict[str, Path | Tensor] = {}
    for name, digest in delta.document["files"].items():
        stored = delta.parts.get(FILE + name)
        if stored is not None:
            found[name] = stored
        elif name in own and (force or hashlib.sha256(own[name].read_bytes()).hexdigest() == digest):
            found[name] = own[name]
        elif not force:
            raise CheckpointError(
                f"{base.folder / name}: is not the file that {delta.path} was extracted beside. Restore it, or go on "
                "without with `force`."
            )
    return found


def _write(piece: Piece, sink: Sink, tick: Tick) -> str:
    """Write one tensor; return the checksum of its base."""
    checksum, word = Checksum(), np.dtype(f"u{BITS[piece.result.dtype] // 8}")
    with ExitStack() as stack:
        base = stack.enter_context(piece.base.open()) if piece.base is not None else None
        whole = stack.enter_context(piece.whole.open()) if piece.whole is not None else None
        patch = stack.enter_context(_Patch(piece.mask, piece.kept)) if piece.mask and piece.kept else None
        for start in range(0, piece.result.entries, CHUNK):
            count = min(CHUNK, piece.result.entries - start)
            out = np.zeros(count, word)
            if base is not None:
                shared = max(min(count, base.tensor.entries - start), 0)
                raw = read_entries(base, start, shared)
                checksum.add(start * BITS[base.tensor.dtype] // 8, raw)
                tick(len(raw))
                if whole is None:
                    out[:shared] = as_words(raw, base.tensor.dtype, piece.result.dtype)
            if patch is not None:
                tick(patch.put(start, out))
            if whole is not None:
                tick(whole.fill(start * word.itemsize, memoryview(out.view(np.uint8))))
            sink.write(start * word.itemsize, out)
    return checksum.text()


class _Patch:
    """The kept values of one tensor, to be put where the mask says, from the first chunk to the last."""

    def __init__(self, mask: Tensor, kept: Tensor) -> None:
        self.mask, self.kept = mask.open(), kept.open()
        self.position = 0

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for reader in (self.mask, self.kept):
            reader.close()
        if kind is None and self.position != self.kept.tensor.entries:
            raise self._damaged()

    def put(self, start: int, out: Array) -> int:
        """Change the entries of the chunk that begins at `start`; return the bytes that were read."""
        bits = bytearray(-(-len(out) // 8))
        self.mask.fill(start // 8, memoryview(bits))
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(out), bitorder="little").view(np.bool_)
        values = np.empty(int(np.count_nonzero(mask)), out.dtype)
        if self.position + len(values) > self.kept.tensor.entries:
            raise self._damaged()
        self.kept.fill(self.position * out.itemsize, memoryview(values.view(np.uint8)))
        out[mask] = values
        self.position += len(values)
        return len(bits) + values.nbytes

    def _damaged(self) -> CheckpointError:
        tensor = self.kept.tensor
        return CheckpointError(f"{tensor.path}: {tensor.name} does not fit its mask. Extract the task vector again.")


def _report(job: ApplyJob, checksums: dict[str, str], command: Sequence[str]) -> dict[str, Any]:
    document = dict(job.delta.document["report"])
    notes = list(document["notes"])
    recorded = {line["name"]: line["checksum"] for line in document["tensors"]}
    other = [name for name, checksum in checksums.items() if recorded[name] != checksum]
    if other and not job.force:
        raise CheckpointError(
            f"{job.delta.path}: tensor {other[0]} does not come out as it was extracted: the file is damaged. Extract it again."
        )
    if other:
        notes.append(
            f"Applied with `force` to another base: {len(other)} tensors differ from those that were extracted, and the counts "
            "and distances are those of the extraction."
        )
    return document | {
        "command": list(command),
        "output": job.out.name,
        "versions": provenance.versions(),
        "notes": notes,
        "applied": {
            "delta": str(job.delta.path.absolute()),
            "pre": asdict(job.base.source) | {"folder": str(job.base.folder)},
        },
        "tensors": [line | {"checksum": checksums[line["name"]]} for line in document["tensors"]],
    }
