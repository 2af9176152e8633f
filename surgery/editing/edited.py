"""A checkpoint that is edited while it is read, without writing files; the same bytes as `run` would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import local

from surgery.checkpoint.source import Checkpoint
from surgery.checkpoint.tensor import Computed, Sink, Tensor
from surgery.editing import report
from surgery.editing.job import Job
from surgery.editing.run import Engine, engines
from surgery.engines.results import Result
from surgery.engines.stream import Tick
from surgery.methods.actions import Step


@dataclass
class Edited:
    """A checkpoint whose tensors are computed each time they are read.

    Args:
        job: the planned edit.
        device, allow_nonfinite: as for `surgery.editing.run.run`.

    Attributes:
        checkpoint: its tensors have ft's names, types and shapes.
        results: what the edit did to each tensor that was read, by its name.
    """

    job: Job
    device: str = "auto"
    allow_nonfinite: bool = False
    checkpoint: Checkpoint = field(init=False)
    results: dict[str, Result] = field(init=False, default_factory=dict)
    _engines: local = field(init=False, repr=False)

    def __post_init__(self) -> None:
        make = engines(self.device, self.allow_nonfinite)
        self._engines = local()  # an engine has buffers of its own, so that each thread has one
        tensors = {
            step.ft.name: Tensor(
                step.ft.name,
                step.ft.dtype,
                step.ft.shape,
                Computed(step.ft.path, step.ft.nbytes, partial(self._make, make, step)),
            )
            for step in self.job.steps
        }
        ft = self.job.pair.ft
        self.checkpoint = Checkpoint(ft.source, ft.format, tensors, ft.files, self.job.container)

    def _make(self, make: Callable[[Tick], Engine], step: Step, sink: Sink) -> None:
        if not hasattr(self._engines, "own"):
            self._engines.own = make(lambda _: None)
        self.results[step.ft.name] = self._engines.own.run(step, sink)

    @property
    def totals(self) -> report.Summary:
        """Return the report's lines of all tensors. Tensors that were not read yet are read now."""
        for step in self.job.steps:
            if step.ft.name not in self.results:
                self.checkpoint.tensors[step.ft.name].open().close()
        return report.summarize([report.describe(step, self.results[step.ft.name]) for step in self.job.steps])
