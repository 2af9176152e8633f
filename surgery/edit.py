"""The one loop that every method runs through: plan a job from headers, then stream each tensor from ft to the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from surgery import kernels, report
from surgery.actions import Prune
from surgery.checkpoint.companions import companions
from surgery.checkpoint.container import MAX_SHARD_SIZE, Container, split
from surgery.checkpoint.draft import REPORT, Draft, check_output, explain
from surgery.checkpoint.formats import SETS
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.source import BORROWING, Checkpoint, open_both, read_json
from surgery.engines.cpu import CpuEngine
from surgery.engines.cpu import Sink as SinkProtocol
from surgery.engines.plan import Step
from surgery.engines.results import Result
from surgery.errors import CheckpointError
from surgery.methods import Method
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

    @property
    def nbytes(self) -> int:
        return sum(step.ft.nbytes for step in self.steps)

    @property
    def reading(self) -> int:
        return sum(_reading(step) for step in self.steps)


def check_machine(device: str, workers: int | None) -> None:
    """Raise OptionError unless this machine can run on the device with so many workers."""
    count_workers(workers)
    if device not in ("auto", "cpu"):
        from surgery.engines.cuda import find_device

        find_device(device)


def prepare(
    pre: str | Path,
    ft: str | Path,
    method: Method,
    *,
    out: Path | None = None,
    force: bool = False,
    strict: bool = False,
    max_shard_size: str | None = None,
) -> Job:
    """Open a pair, plan the edit and check the output, reading headers only.

    Args:
        pre, ft: folders, files, or hub ids with an optional `@revision`.
        method: with its parameters.
        out: the output folder; by default a sibling of ft named after the method.
        force: an existing checkpoint at `out` may be replaced.
        strict: refuse a pair whose tensors or vocabularies do not match one to one.
        max_shard_size: cut the output anew into files of at most this size, such as "5GB"; by default as ft is cut, or at 5 GB
            where ft is in another format than safetensors.

    Raises:
        SurgeryError: anything that can be refused before working.
    """
    base, (tuned,) = open_both(str(pre), str(ft))
    both = pair(base, tuned, strict=strict)
    actions = method.plan(both.items)
    container = tuned.container if max_shard_size is None else None
    container = container or split(tuned.tensors, max_shard_size or MAX_SHARD_SIZE)
    copies = _copies(base, tuned)
    target = check_output(out or _default_out(tuned, method), [*_inputs(base), *_inputs(tuned)], force=force)
    steps = [Step(item.ft, item.pre, item.place, action) for item, action in zip(both.items, actions, strict=True)]
    return Job(both, method, steps, container, target, force, copies)


def _copies(pre: Checkpoint, ft: Checkpoint) -> dict[str, Path]:
    """What a loader needs beside the weights: ft's own, and pre's where ft's format has none."""
    found = companions(ft.folder, only_known=ft.source.file is not None)
    if ft.format in BORROWING:
        found = companions(pre.folder, only_known=pre.source.file is not None) | found
    if CONFIG not in found:
        raise CheckpointError(f"{ft.folder}: config.json is missing, so nothing could load the result. Copy it there.")
    read_json(found[CONFIG])
    return found


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    """What must not be written to. A folder may hold links, to the hub's cache or elsewhere: what they lead to is input too."""
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
    make_engine = _engine(device, allow_nonfinite)
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
            return lambda step: draft.finish(step.ft.name, asdict(engine.run(step, draft.sink(step.ft.name))))

        advance(job.reading - sum(map(_reading, todo)))
        try:
            stream(sorted(todo, key=lambda step: -step.ft.nbytes), work, count_workers(workers), advance)
        except OSError as error:
            raise explain(error, job.out) from error
        for side, checkpoint in (("pre", job.pair.pre), ("ft", job.pair.ft)):
            if _files(checkpoint) != identity[side]:
                raise CheckpointError(f"{checkpoint.folder}: its files changed while surgery read them. Run it again.")
        # A resumed run reports the command that began it.
        document = _report(job, draft.done, draft.identity["command"])
        files = {
            REPORT: report.dumps(document),
            "README.md": report.model_card(document, job.out.name).encode(errors="backslashreplace"),
        }
        if job.container.index is not None:
            weight_map = {name: file for file, shard in job.container.shards.items() for name in shard.names}
            index = {"metadata": job.container.index, "weight_map": weight_map}
            files[SETS[0][2]] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        draft.commit(files, job.copies)
    return document


def _engine(device: str, allow_nonfinite: bool) -> Callable[[Callable[[int], None]], Engine]:
    if device in ("auto", "cpu"):
        return lambda tick: CpuEngine(tick, allow_nonfinite=allow_nonfinite)
    from surgery.engines.cuda import CudaEngine, find_device

    found = find_device(device)
    return lambda tick: CudaEngine(tick, found, allow_nonfinite=allow_nonfinite)


def _reading(step: Step) -> int:
    base = step.pre.nbytes if step.pre else 0
    if isinstance(step.action, Prune):  # for the mean, for the threshold, for the output
        return (2 * step.ft.nbytes + 2 * base) + (base if step.action.uses_mean else 0)
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
        "method": job.method.name,
        "options": {**asdict(job.method), "allow_nonfinite": allow_nonfinite, "device": device},  # type: ignore[call-overload]
        "kernels": "C" if kernels.native else "numpy",
        "command": [word for word in command if word != "--resume"],
    }


def _files(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Size and time of each file, and what it holds: enough to notice another file, without reading it."""
    found: dict[str, list[Any]] = {}
    for name, path in checkpoint.files.items():
        status = path.stat()
        found[name] = [status.st_size, status.st_mtime_ns]
    layout = sorted((tensor.name, tensor.dtype, tensor.shape, tensor.start) for tensor in checkpoint.tensors.values())
    return found | {"tensors": [hashlib.sha256(repr(layout).encode()).hexdigest()]}


def _report(job: Job, results: dict[str, dict[str, Any]], command: Sequence[str]) -> dict[str, Any]:
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
        "pre": _source(job.pair.pre),
        "ft": _source(job.pair.ft),
        "output": job.out.name,
        "versions": report.versions(),
        "kernels": "C" if kernels.native else "numpy",
        "notes": notes,
        "totals": report.as_json(report.summarize(lines)),
        "categories": {name: report.as_json(group) for name, group in report.by_category(lines).items()},
        "tensors": lines,
    }


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    source = checkpoint.source
    return {
        "typed": source.typed,
        "repo": source.repo,
        "revision": source.revision,
        "folder": str(source.folder.absolute()),
    }
