"""A fault at the calls of every writer: `benchmarks/faults.py` tries all of them, and this draws some."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator

import pytest
from helpers.fault_cases import cases
from helpers.faults import FAULTS, Bench, Case, Faults

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="calls are counted by a library that is compiled here"
)
DRAWN = 2


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with Faults(tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_nothing_is_lost_and_nothing_is_half_written(
    faults: Faults, case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench = Bench(faults, case, tmp_path_factory.mktemp("runs"))
    draw = random.Random(case.name)
    wrong = []
    for fault in FAULTS:
        points = list(bench.points(fault))
        # One anywhere, and one in the last calls, where the output appears and what is left over goes.
        drawn = [*draw.sample(points, DRAWN - 1), draw.choice(points[-40:])]
        wrong += [said for at in drawn if (said := bench.faulty(fault, at))]
    assert wrong == []
