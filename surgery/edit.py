"""The one loop that every method runs through: plan a job from headers, then stream each tensor from ft to the output."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from surgery import kernels, report
from surgery.actions import Prune
from surgery.checkpoint.companions import companions
from surgery.checkpoint.draft import REPORT, Draft, check_output, explain
from surgery.checkpoint.pair import Pair, pair
from surgery.checkpoint.source import INDEX, Checkpoint, open_checkpoint
from surgery.engines.cpu import CpuEngine
from surgery.engines.cpu import Sink as SinkProtocol
from surgery.engines.plan import Step
from surgery.engines.results import Result
from surgery.errors import CheckpointError, OptionError
from surgery.methods import Method

# More threads than this wait for the interpreter, not for the data.
MAX_WORKERS = 8


class Engine(Protocol):
    """One worker: it edits a tensor and hands the bytes to a sink."""

    def run(self, step: Step, sink: SinkProtocol) -> Result:
        """Carry out a step."""


@dataclass(frozen=True)
class Job:
    """Everything about a run that headers can tell, checked.

    Attributes:
        steps: one for each tensor of ft, in the order of ft's shards.
        out: the output folder.
        replace: a checkpoint that is there may be replaced.
        copies: ft's files that travel with its weights: name in the output -> path.
        nbytes: the size of the output's weights.
        reading: bytes that will be read, for the progress bar.
    """

    pair: Pair
    method: Method
    steps: list[Step]
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
    if workers is not None and workers < 1:
        raise OptionError(f"--workers must be 1 or more, not {workers}.")
    if device not in ("auto", "cpu"):
        from surgery.engines.cuda import find_device

        find_device(device)


class Stopped(Exception):
    """Raised in a worker when another one failed or the user pressed Ctrl-C."""


def prepare(pre: str | Path, ft: str | Path, method: Method, *, out: Path | None = None, force: bool = False) -> Job:
    """Open a pair, plan the edit and check the output, reading headers only.

    Args:
        pre, ft: folders, or hub ids with an optional `@revision`.
        method: with its parameters.
        out: the output folder; by default a sibling of ft named after the method.
        force: an existing checkpoint at `out` may be replaced.

    Raises:
        SurgeryError: anything that can be refused before working.
    """
    tuned = open_checkpoint(str(ft), needs_config=True)
    base = open_checkpoint(str(pre))
    both = pair(base, tuned)
    actions = method.plan(both.items)
    # A folder may hold links, to the hub's cache or elsewhere: what they lead to is input too.
    inputs = [path for folder in (base.folder, tuned.folder) for path in (folder, *sorted(folder.iterdir()))]
    target = check_output(out or _default_out(tuned, method), inputs, force=force)
    steps = [
        Step(item.ft, item.pre, item.place, action, item.ft.path.name)
        for item, action in zip(both.items, actions, strict=True)
    ]
    return Job(both, method, steps, target, force, companions(tuned.folder))


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
    count = workers or min(_cores(), MAX_WORKERS)
    identity = _identity(job, allow_nonfinite, device, command)
    metadata = {name: header.metadata for name, header in job.pair.ft.shards.items()}
    shards = {
        name: ([step.ft for step in job.steps if step.shard == name], metadata[name])
        for name in job.pair.ft.shards
        if any(step.shard == name for step in job.steps)
    }
    extra = sum(path.stat().st_size for path in job.copies.values())
    with Draft(job.out, shards, identity, resume=resume, replace=job.replace, extra=extra) as draft:
        todo = [step for step in job.steps if step.ft.name not in draft.done]
        advance(job.reading - sum(map(_reading, todo)))
        try:
            _stream(todo, draft, make_engine, count, advance)
        except OSError as error:
            raise explain(error, job.out) from error
        for side, checkpoint in (("pre", job.pair.pre), ("ft", job.pair.ft)):
            if _files(checkpoint) != identity[side]:
                raise CheckpointError(f"{checkpoint.folder}: its shards changed while surgery read them. Run it again.")
        # A resumed run reports the command that began it.
        document = _report(job, draft.done, draft.identity["command"])
        files = {
            REPORT: report.dumps(document),
            "README.md": report.model_card(document, job.out.name).encode(errors="backslashreplace"),
        }
        if job.pair.ft.index is not None:
            weight_map = {step.ft.name: step.shard for step in job.steps}
            index = {"metadata": job.pair.ft.index, "weight_map": weight_map}
            files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        draft.commit(files, job.copies)
    return document


def _stream(
    todo: Sequence[Step],
    draft: Draft,
    make_engine: Callable[[Callable[[int], None]], Engine],
    count: int,
    advance: Callable[[int], None],
) -> None:
    """Run the steps on `count` threads, the largest first so that they end together."""
    work: queue.SimpleQueue[Step] = queue.SimpleQueue()
    for step in sorted(todo, key=lambda step: -step.ft.nbytes):
        work.put(step)
    stop = threading.Event()
    failures: list[BaseException] = []
    read = [0] * count

    def worker(number: int) -> None:
        def tick(nbytes: int) -> None:
            read[number] += nbytes
            if stop.is_set():
                raise Stopped

        try:
            engine = make_engine(tick)
            while True:
                step = work.get_nowait()
                result = engine.run(step, draft.sink(step.ft.name))
                draft.finish(step.ft.name, asdict(result))
        except (queue.Empty, Stopped):
            return
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=worker, args=(number,), daemon=True) for number in range(count)]
    shown = 0
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.1 / count)
            total = sum(read)
            advance(total - shown)
            shown = total
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
    advance(sum(read) - shown)


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
    folder = Path(os.path.realpath(ft.folder))
    return folder.with_name(f"{folder.name}-{method.label()}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """Size, time and header of each shard: enough to notice another file, without reading it."""
    found = {}
    for name, header in checkpoint.shards.items():
        status = header.path.stat()
        layout = sorted((t.name, t.dtype, t.shape, t.begin) for t in header.tensors.values())
        found[name] = [status.st_size, status.st_mtime_ns, hashlib.sha256(repr(layout).encode()).hexdigest()]
    return found


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
