"""Write the task vector that a method leaves, alone, as one file: see `surgery.checkpoint.delta` for what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checksum import fingerprint
from surgery.checkpoint.companions import companions
from surgery.checkpoint.delta import FORMAT, DeltaDraft, DeltaSink
from surgery.checkpoint.durable import explain
from surgery.editing.job import Job, check_unchanged, stamps
from surgery.editing.run import check_machine, engines, report_of
from surgery.engines.stream import Tick, stream
from surgery.engines.stream import workers as count_workers
from surgery.methods.actions import Step


def extract(
    job: Job,
    out: Path,
    *,
    force: bool = False,
    device: str = "auto",
    workers: int | None = None,
    allow_nonfinite: bool = False,
    command: Sequence[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], int]:
    """Carry a job out, but write the task vector that is left instead of a checkpoint.

    Args:
        job: of `surgery.editing.job.plan`.
        out: the file, as `check_file` gave it.
        force: a file that is there may be replaced.
        device, workers, allow_nonfinite, command, advance: as for `surgery.editing.run.run`.

    Returns:
        The report of the method, and the size of the file.

    Raises:
        SurgeryError, KeyboardInterrupt: nothing is left behind.
    """
    check_machine(device, workers)
    make_engine = engines(device, allow_nonfinite)
    before = stamps(job)
    results: dict[str, dict[str, Any]] = {}
    with DeltaDraft(out, replace=force) as draft:

        def work(tick: Tick) -> Callable[[Step], None]:
            engine = make_engine(tick)

            def do(step: Step) -> None:
                sink = draft.sink(step.ft, step.pre if _comparable(step) else None)
                result = engine.run(step, sink)
                sink.close()
                results[step.ft.name] = asdict(replace(result, checksum=sink.checksum.text()))

            return do

        try:
            stream(sorted(job.steps, key=lambda step: -step.ft.nbytes), work, count_workers(workers), advance)
        except OSError as error:
            raise explain(error, out) from error
        check_unchanged(job, before)
        report = report_of(job, results, device, command)
        tensors = [_line(step, draft.sinks[step.ft.name]) for step in job.steps]
        digests, stored = _files(job)
        source = job.pair.pre.source
        base = {line["base"]["name"]: line["base"]["checksum"] for line in tensors if line["base"]}
        metadata = {
            "format": FORMAT,
            "base": source.repo or str(source.folder.absolute()),
            "revision": source.revision or "",
            "fingerprint": fingerprint(base),
            "method": job.method.name,
            "document": json.dumps(
                {
                    "tensors": tensors,
                    "shards": {name: asdict(shard) for name, shard in job.container.shards.items()},
                    "index": job.container.index,
                    "files": digests,
                    "report": report,
                },
                allow_nan=False,
            ),
        }
        size = draft.commit(metadata, stored)
    report["notes"].extend(draft.left)
    return report, size


def _comparable(step: Step) -> bool:
    """Return whether the base has the dtype of ft, or can be cast to it."""
    return step.pre is not None and (step.ft.is_float or step.ft.dtype == step.pre.dtype)


def _line(step: Step, sink: DeltaSink) -> dict[str, Any]:
    base = sink.pre and {
        "name": sink.pre.name,
        "dtype": sink.pre.dtype,
        "shape": list(sink.pre.shape),
        "checksum": sink.base_checksum.text(),
    }
    return {"name": step.ft.name, "dtype": step.ft.dtype, "shape": list(step.ft.shape), "base": base}


def _files(job: Job) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the SHA-256 of each file beside the weights, and the content of those that the base does not have."""
    source = job.pair.pre.source
    own = companions(source.folder, only_known=source.file is not None)
    digests, stored = {}, {}
    contents = {name: path.read_bytes() for name, path in job.copies.items()} | job.changed
    for name, content in contents.items():
        digests[name] = hashlib.sha256(content).hexdigest()
        if name not in own or own[name].read_bytes() != content:
            stored[name] = content
    return digests, stored
