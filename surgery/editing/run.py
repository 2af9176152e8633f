"""Carry out a job: stream each tensor from its inputs to the output, and report what was done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from surgery import native, provenance
from surgery.checkpoint.companions import WEIGHTS
from surgery.checkpoint.container import Container
from surgery.checkpoint.draft import Draft
from surgery.checkpoint.durable import explain
from surgery.checkpoint.formats.safetensors import INDEX
from surgery.checkpoint.part import Part
from surgery.checkpoint.tensor import Sink
from surgery.editing import report
from surgery.editing.job import Job, check_unchanged, identity, reading
from surgery.engines.cpu import CpuEngine
from surgery.engines.results import Result
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.methods import parameters
from surgery.methods.actions import Step


class Engine(Protocol):
    """One worker: it edits a tensor and hands the bytes to a sink."""

    def run(self, step: Step, sink: Sink) -> Result:
        """Carry out a step."""


def check_machine(device: str, workers: int | None) -> None:
    """Raise OptionError unless this machine can run on the device with so many workers."""
    count_workers(workers)
    if device not in ("auto", "cpu"):
        from surgery.device import find_device

        find_device(device)


def run(job: Job, **options: Any) -> dict[str, Any]:
    """Carry a job out in one process and return its report, which is also in the output.

    Args:
        options: those of `run_part`, but for `part`.

    Raises:
        SurgeryError: the output or its disk, or numbers that cannot be edited; nothing is left behind.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    report = run_part(job, None, **options)
    assert not isinstance(report, Outstanding)
    return report


@dataclass(frozen=True)
class Outstanding:
    """A line about a part that is done while others are not.

    Attributes:
        nbytes: that the part has written.
        parts: which are outstanding; none if another process has just let the output appear.
    """

    nbytes: int
    parts: list[Part]


def run_part(
    job: Job,
    part: Part | None,
    *,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    allow_nonfinite: bool = False,
    command: Sequence[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any] | Outstanding:
    """Carry out the part of a job that falls to this process.

    The process that ends last lets the output appear and returns its report.

    Args:
        part: the share of this process; None does everything.
        device: "auto" or "cpu" for this machine's processor, which keeps up with its disk; "cuda" or "cuda:N" for a GPU.
        workers: threads; by default one for each core, at most 8.
        resume: continue a killed run with the same inputs, method and options.
        allow_nonfinite: let NaN and Inf of edited tensors pass.
        command: the command line, for the report.
        advance: called now and then, from this thread, with the number of bytes read since.

    Raises:
        SurgeryError: the output or its disk, or numbers that cannot be edited; nothing of this part is left behind.
        KeyboardInterrupt: Ctrl-C; nothing of this part is left behind.
    """
    check_machine(device, workers)
    make_engine = engines(device, allow_nonfinite)
    about = identity(job, allow_nonfinite, device, command)
    if part is not None:
        about["parts"] = part.count
    tensors = job.pair.ft.tensors
    shards = {
        file: ([tensors[name] for name in shard.names], shard.metadata) for file, shard in job.container.shards.items()
    }
    extra = sum(path.stat().st_size for path in job.copies.values())
    with Draft(job.out, shards, about, resume=resume, replace=job.replace, extra=extra, part=part) as draft:
        remaining = set(draft.remaining(step.ft.name for step in job.steps))
        todo = [step for step in job.steps if step.ft.name in remaining]

        def work(tick: Tick) -> Callable[[Step], None]:
            engine = make_engine(tick)

            def do(step: Step) -> None:
                sink = draft.sink(step.ft.name)
                result = engine.run(step, sink)
                result.checksum = sink.checksum.text()
                draft.finish(step.ft.name, asdict(result))

            return do

        advance(job.reading - sum(map(reading, todo)))
        try:
            stream(sorted(todo, key=lambda step: -step.ft.nbytes), work, count_workers(workers), advance)
        except OSError as error:
            raise explain(error, job.out) from error
        check_unchanged(job, about)
        if not draft.complete():
            return Outstanding(sum(draft.sizes[name] for name in draft.own), draft.waiting)
        # A resumed run reports the command that began it.
        document = report_of(job, draft.done, device, draft.identity["command"])
        draft.commit(documents(document, job.container) | job.changed, job.copies, document)
    document["notes"].extend(draft.left)
    return document


def documents(document: dict[str, Any], container: Container) -> dict[str, bytes]:
    """Return the files that surgery itself writes beside weights and report: the model card, and the index of several shards."""
    files = {
        "README.md": report.model_card(document, document["output"]).encode(errors="backslashreplace"),
    }
    if container.index is not None:
        weight_map = {name: file for file, shard in container.shards.items() for name in shard.names}
        index = {"metadata": container.index, "weight_map": weight_map}
        files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return files


def engines(device: str, allow_nonfinite: bool) -> Callable[[Tick], Engine]:
    """Return the function that makes a worker's engine on a device."""
    if device in ("auto", "cpu"):
        return lambda tick: CpuEngine(tick, allow_nonfinite=allow_nonfinite)
    from surgery.device import find_device
    from surgery.engines.cuda import CudaEngine

    found = find_device(device)
    return lambda tick: CudaEngine(tick, found, allow_nonfinite=allow_nonfinite)


def taken(device: str) -> str:
    """The device that an edit runs on, and why it is that one."""
    if device == "auto":
        return "the processor, which keeps up with its disk; a GPU would wait too"
    if device == "cpu":
        return "the processor, as asked"
    import torch

    from surgery.device import find_device

    found = find_device(device)
    return f"{torch.cuda.get_device_name(found)} ({found}), as asked"


def _unchanged(job: Job) -> str:
    """A warning that there was nothing to edit, with what else may hold the fine-tuning."""
    folder = job.pair.ft.folder
    read = set(job.pair.ft.files)
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS) and path.name not in read)
    there = f" Beside what was read, it holds {', '.join(others[:5])}." if others else ""
    return f"Warning: pre and ft have the same numbers everywhere. Is {folder} the model that was fine-tuned?{there}"


def report_of(job: Job, results: dict[str, dict[str, Any]], device: str, command: Sequence[str]) -> dict[str, Any]:
    """Return the report of a job, from the `Result` of every tensor and the device that was asked for."""
    lines = [report.describe(step, Result(**results[step.ft.name])) for step in job.steps]
    notes = list(job.pair.notes)
    passed = [line["name"] for line in lines if line.get("nonfinite")]
    if passed:
        notes.append(
            f"NaN or Inf, as in the inputs: {', '.join(passed[:3])}{' and others' if len(passed) > 3 else ''}."
        )
    if not any(line["distance_before"] for line in lines):
        notes.append(_unchanged(job))
    return {
        "method": job.method.name,
        "parameters": json.loads(json.dumps(parameters(job.method))),
        "command": list(command),
        "pre": provenance.origin(job.pair.pre),
        "ft": provenance.origin(job.pair.ft),
        **({"others": [provenance.origin(other) for other in job.others]} if job.others else {}),
        "output": job.out.name,
        "versions": provenance.versions(),
        "kernels": "C" if native.compiled else "numpy",
        "device": taken(device),
        "notes": notes,
        "totals": report.as_json(report.summarize(lines)),
        "categories": {name: report.as_json(group) for name, group in report.by_category(lines).items()},
        "tensors": lines,
    }
