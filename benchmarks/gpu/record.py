"""What a part of the GPU benchmark found: lines for the table, and every number, on disk after each of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Record:
    """The findings of one part.

    Attributes:
        path: the JSON file, written anew with every finding.
        work: a folder for what the part needs on disk.
        small: do everything, on the processor, in a few seconds.
        end: when the part's time is over, on the clock of time.monotonic.
        lines: for the table: what, result, what to hold it against.
        data: every number, by name.
    """

    path: Path
    work: Path
    small: bool
    end: float
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.small else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.end - time.monotonic()

    def line(self, what: str, result: str, against: str = "") -> None:
        """Put a line on the table; one with the same `what` is replaced."""
        self.lines = [line for line in self.lines if line[0] != what] + [(what, result, against)]
        print(f"  {what}: {result}" + (f" ({against})" if against else ""), flush=True)
        self._save()

    def keep(self, name: str, value: Any) -> None:
        """Put a number, or what holds numbers, into the file."""
        self.data[name] = value
        self._save()

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[..., object], *arguments: Any) -> float:
        """Seconds that a call takes, the device's work included."""
        self.wait()
        start = time.perf_counter()
        call(*arguments)
        self.wait()
        return time.perf_counter() - start

    def _save(self) -> None:
        making = self.path.with_suffix(".making")
        making.write_text(json.dumps({"lines": self.lines, "data": self.data}, indent=1) + "\n")
        making.replace(self.path)
