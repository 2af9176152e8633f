"""Measurements that an engine takes while it edits one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.engines.kernels import Distance


@dataclass(slots=True)
class Result:
    """Counts and squared distances of one tensor.

    kept and pruned count the entries that are ft's and pre's by the method's choice (None where it makes none, as in an
    average); differ counts those whose value in the output is not pre's. before2 and after2 are ‖ft − pre‖² and
    ‖out − pre‖², weight2 is ‖pre‖². A tensor without a base has all of these None. checksum is that of
    the tensor's bytes in the output.
    """

    kept: int | None = None
    pruned: int | None = None
    differ: int | None = None
    before2: float | None = None
    after2: float | None = None
    weight2: float | None = None
    nonfinite: bool = False
    checksum: str = ""

    def __add__(self, other: Result) -> Result:
        """The result of two groups of one tensor, all of whose numbers are known."""
        added: dict[str, Any] = {
            name: (getattr(self, name) or 0) + (getattr(other, name) or 0)
            for name in ("kept", "pruned", "differ", "before2", "after2", "weight2")
        }
        return Result(**added, nonfinite=self.nonfinite or other.nonfinite)


class Sums:
    """The running sums of one tensor."""

    def __init__(self) -> None:
        self.before2 = self.after2 = self.weight2 = 0.0
        self.differ = 0

    def add(self, before: Distance, after2: float, differ: int) -> None:
        self.before2 += before.delta2
        self.weight2 += before.weight2
        self.after2 += after2
        self.differ += differ

    def result(self, kept: int | None, pruned: int | None) -> Result:
        return Result(kept, pruned, self.differ, self.before2, self.after2, self.weight2)
