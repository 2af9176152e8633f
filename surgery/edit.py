"""The one loop that every method runs through: plan a job from headers, then stream each tensor from ft to the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from surgery import kernels, report
from surgery.actions import Merge, Prune
from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import MAX_SHARD_SIZE, Container, split
from surgery.checkpoint.draft import REPORT, Draft, check_output
from surgery.checkpoint.durable import explain
from surgery.checkpoint.formats import SETS
from surgery.checkpoint.json_file import read_json
from surgery.checkpoint.pair import Pair, likes, pair
from surgery.checkpoint.source import BORROWING, Checkpoint, open_both
from surgery.engines.cpu import CpuEngine
from surgery.engines.cpu import Sink as SinkProtocol
from surgery.engines.plan import Step
from surgery.engines.results import Result
from surgery.errors import CheckpointError, OptionError
from surgery.methods import MERGES, Method
from surgery.stream import Tick, stream
from surgery.stream import workers as count_workers

CONFIG = "config.json"


class Engine(Protocol):
    """One worker: it edits a tensor and hands the bytes to a sink."""

    def run(self, step: Step, sink: SinkProtocol) -> Result:
        """Carry out a step."""


@dataclass(frozen=True)
class Job:
    """Everything about a run that headers can tell, checked.

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
        return sum(_reading(step) for step in self.steps)

    @property
    def inputs(self) -> list[Path]:
        """What must not be written to."""
        return [path for checkpoint in (self.pair.pre, self.pair.ft, *self.others) for path in _inputs(checkpoint)]


def check_machine(device: str, workers: int | None) -> None:
    """Raise OptionError unless this machine can run on the device with so many workers."""
    count_workers(workers)
    if device not in ("auto", "cpu"):
        from surgery.engines.cuda import find_device

        find_device(device)


def prepare(
    pre: str | Path,
    ft: str | Path | Sequence[str | Path],
    method: Method,
    *,
    out: Path | None = None,
    force: bool = False,
    strict: bool = False,
    max_shard_size: str | None = None,
) -> Job:
    """Open a pair, plan the edit and check the output, reading headers only.

    Args:
        pre, ft, method, strict, max_shard_size: as for `plan`.
        out: the output folder; by default a sibling of ft named after the method.
        force: an existing checkpoint at `out` may be replaced.

    Raises:
        SurgeryError: anything that can be refused before working.
    """
    job = plan(pre, ft, method, strict=strict, max_shard_size=max_shard_size)
    return replace(job, out=check_output(out or job.out, job.inputs, force=force), replace=force)


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
    if len(names) > 1 and not isinstance(method, MERGES):
        raise OptionError(f"{method.name} takes one --ft, not {len(names)}: ties and dare merge several.")
    base, (tuned, *others) = open_both(str(pre), *map(str, names))
    both = pair(base, tuned, strict=strict)
    actions = method.plan(both.items)
    container = tuned.container
    if container is None or max_shard_size is not None:
        container = split(tuned.tensors, MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    copies = _copies(base, tuned)
    changed = _resized(copies, both)
    steps = [Step(item.ft, item.pre, item.place, action) for item, action in zip(both.items, actions, strict=True)]
    merged = {step.ft.name for step in steps if isinstance(step.action, Merge)}
    further = [likes(both, pair(base, other, strict=strict), merged) for other in others]
    steps = [
        replace(step, others=tuple(found[step.ft.name] for found, _ in further)) if step.ft.name in merged else step
        for step in steps
    ]
    both.notes.extend(note for _, notes in further for note in notes)
    return Job(both, method, steps, container, _default_out(tuned, method), False, copies, changed, tuple(others))


def _copies(pre: Checkpoint, ft: Checkpoint) -> dict[str, Path]:
    """What a loader needs beside the weights: ft's own, and pre's where ft's format has none."""
    found = companions(ft.folder, only_known=ft.source.file is not None)
    if ft.format in BORROWING:
        found = companions(pre.folder, only_known=pre.source.file is not None) | found
    if CONFIG not in found:
        raise CheckpointError(f"{ft.folder}: config.json is missing, so nothing could load the result. Copy it there.")
    return found


def _resized(copies: Mapping[str, Path], both: Pair) -> dict[str, bytes]:
    """pre's configuration with the size of ft's vocabulary, where it is pre's that goes with ft's weights."""
    config = read_json(copies[CONFIG])
    if both.ft.format not in BORROWING:
        return {}
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

    renewed = renew(config)
    return {} if renewed == config else {CONFIG: (json.dumps(renewed, indent=2) + "\n").encode()}


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    """A checkpoint's folder and files, and what links in it lead to: the hub's cache, or elsewhere."""
    if checkpoint.source.file:
        return list(checkpoint.files.values())
    return [checkpoint.folder, *sorted(checkpoint.folder.iterdir()), *checkpoint.files.values()]


def run(
    job: Job,
    *,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    command: Sequence[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Carry a job out and return its report, which is also in the output.

    Args:
        device: "auto" or "cpu" for this machine's processor, which keeps up with its disk; "cuda" or "cuda:N" for a GPU.
        workers: threads; by default one for each core, at most 8.
        resume: continue a killed run with the same inputs, method and options.
        allow_nonfinite: let NaN and Inf of edited tensors pass.
        command: the command line, for the report.
        advance: called now and then, from this thread, with the number of bytes read since.

    Raises:
        SurgeryError: the output or its disk, or numbers that cannot be edited; nothing is left behind.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    check_machine(device, workers)
    make_engine = engines(device, allow_nonfinite)
    identity = _identity(job, allow_nonfinite, device, command)
    tensors = job.pair.ft.tensors
    shards = {
        file: ([tensors[name] for name in shard.names], shard.metadata) for file, shard in job.container.shards.items()
    }
    extra = sum(path.stat().st_size for path in job.copies.values())
    with Draft(job.out, shards, identity, resume=resume, replace=job.replace, extra=extra) as draft:
        todo = [step for step in job.steps if step.ft.name not in draft.done]

        def work(tick: Tick) -> Callable[[Step], None]:
            engine = make_engine(tick)

            def do(step: Step) -> None:
                sink = draft.sink(step.ft.name)
                result = engine.run(step, sink)
                result.checksum = sink.checksum.text()
                draft.finish(step.ft.name, asdict(result))

            return do

        advance(job.reading - sum(map(_reading, todo)))
        try:
            stream(sorted(todo, key=lambda step: -step.ft.nbytes), work, count_workers(workers), advance)
        except OSError as error:
            raise explain(error, job.out) from error
        inputs = {"pre": job.pair.pre, "ft": job.pair.ft, **_numbered(job.others)}
        for side, checkpoint in inputs.items():
            if _files(checkpoint) != identity[side]:
                raise CheckpointError(f"{checkpoint.folder}: its files changed while surgery read them. Run it again.")
        # A resumed run reports the command that began it.
        document = report_of(job, draft.done, draft.identity["command"])
        draft.commit(documents(document, job.container) | job.changed, job.copies)
    return document


def documents(document: dict[str, Any], container: Container) -> dict[str, bytes]:
    """The files that surgery itself writes beside the weights: report, model card, and the index where there is one."""
    files = {
        REPORT: report.dumps(document),
        "README.md": report.model_card(document, document["output"]).encode(errors="backslashreplace"),
    }
    if container.index is not None:
        weight_map = {name: file for file, shard in container.shards.items() for name in shard.names}
        index = {"metadata": container.index, "weight_map": weight_map}
        files[SETS[0][2]] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return files


def engines(device: str, allow_nonfinite: bool) -> Callable[[Tick], Engine]:
    """What makes a worker's engine on a device."""
    if device in ("auto", "cpu"):
        return lambda tick: CpuEngine(tick, allow_nonfinite=allow_nonfinite)
    from surgery.engines.cuda import CudaEngine, find_device

    found = find_device(device)
    return lambda tick: CudaEngine(tick, found, allow_nonfinite=allow_nonfinite)


def _reading(step: Step) -> int:
    base = step.pre.nbytes if step.pre else 0
    if isinstance(step.action, Prune):  # for the mean, for the threshold, for the output
        return (2 * step.ft.nbytes + 2 * base) + (base if step.action.uses_mean else 0)
    if isinstance(step.action, Merge):
        once = step.ft.nbytes + base + sum(other.nbytes for other in step.others)
        return once + (once + len(step.others) * base if isinstance(step.action.keeps, Prune) else 0)
    return step.ft.nbytes + base


def _default_out(ft: Checkpoint, method: Method) -> Path:
    if ft.source.repo:
        return Path(f"{ft.source.repo.split('/')[-1]}-{method.label()}")
    path = Path(os.path.realpath(ft.folder / (ft.source.file or "")))
    return path.with_name(f"{path.stem if ft.source.file else path.name}-{method.label()}")


def _identity(job: Job, allow_nonfinite: bool, device: str, command: Sequence[str]) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    return {
        "version": report.versions()["surgery"],
        "pre": _files(job.pair.pre),
        "ft": _files(job.pair.ft),
        **{side: _files(checkpoint) for side, checkpoint in _numbered(job.others).items()},
        "method": job.method.name,
        "options": {**asdict(job.method), "allow_nonfinite": allow_nonfinite, "device": device},  # type: ignore[call-overload]
        "kernels": "C" if kernels.native else "numpy",
        "command": [word for word in command if word != "--resume"],
    }


def _numbered(others: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    return {f"ft {number}": checkpoint for number, checkpoint in enumerate(others, start=2)}


def _files(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Size and time of each file, and what it holds: enough to notice another file, without reading it."""
    found: dict[str, list[Any]] = {}
    for name, path in checkpoint.files.items():
        status = path.stat()
        found[name] = [status.st_size, status.st_mtime_ns]
    layout = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.start) for tensor in checkpoint.tensors.values())
    return found | {"tensors": [hashlib.sha256(repr(layout).encode()).hexdigest()]}


def report_of(job: Job, results: dict[str, dict[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """The report of a job, from the `Result` of every tensor, as a dict."""
    lines = [report.describe(step, Result(**results[step.ft.name])) for step in job.steps]
    notes = list(job.pair.notes)
    passed = [line["name"] for line in lines if line.get("nonfinite")]
    if passed:
        notes.append(
            f"NaN or Inf, as in the inputs: {', '.join(passed[:3])}{' and others' if len(passed) > 3 else ''}."
        )
    return {
        "method": job.method.name,
        "parameters": json.loads(json.dumps(asdict(job.method))),  # type: ignore[call-overload]
        "command": list(command),
        "pre": report.provenance(job.pair.pre),
        "ft": report.provenance(job.pair.ft),
        **({"others": [report.provenance(other) for other in job.others]} if job.others else {}),
        "output": job.out.name,
        "versions": report.versions(),
        "kernels": "C" if kernels.native else "numpy",
        "notes": notes,
        "totals": report.as_json(report.summarize(lines)),
        "categories": {name: report.as_json(group) for name, group in report.by_category(lines).items()},
        "tensors": lines,
    }
