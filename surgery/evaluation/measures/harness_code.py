"""The metric code_eval, which the harness's HumanEval and MBPP take from the hub, on programs that are kept within limits.

pass@k    1 − C(n − c, k) / C(n, k) of n programs of which c pass (Chen et al., arXiv 2107.03374, equation 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from surgery.evaluation import sandbox

CODE_EVAL = "code_eval"


def pass_at(k: int, programs: int, passed: int) -> float:
    """The probability that one of k programs passes, which are drawn from some of which so many pass."""
    return 1.0 - comb(programs - passed, k) / comb(programs, k)


@dataclass(frozen=True)
class CodeEval:
    """The metric, as `evaluate.load` gives it."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """pass@k for each k that is at most the number of programs.

        Args:
            references: tests of each problem, in Python.
            predictions: programs of each problem.

        Returns:
            The means over the problems, and for each problem whether each program passes.
        """
        passed = [
            sandbox.run([f"{program}\n{test}" for program in programs])
            for programs, test in zip(predictions, references, strict=True)
        ]
        fewest = min(map(len, passed), default=0)
        means = {
            f"pass@{many}": sum(pass_at(many, len(row), sum(row)) for row in passed) / len(passed)
            for many in k
            if many <= fewest
        }
        return means, dict(enumerate(passed))
