"""Does any method's default beat the model that `surgery auto` found, on questions that nobody has seen?

    surgery demo --out build/demo
    python benchmarks/auto_demo.py build/demo

makes new held-out questions of the demo's skills, those behind the ones that the demo asked, edits the demo's pair with each
method at its default, and compares all of them with `best`, the model that `surgery auto` wrote at the end of the demo.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from surgery.demo.run import Effort
from surgery.demo.skills import NEW_SKILL, evaluation_items, general_skills, write_skills
from surgery.methods import METHODS

ASKED = Effort().items
NEW = 400


def main(demo: Path) -> int:
    fresh, skills = demo / "fresh", (*general_skills(0), NEW_SKILL)
    asked = {skill.name: evaluation_items(skill, ASKED + NEW)[ASKED:] for skill in skills}
    if not fresh.exists():  # the demo has asked all facts, and nearly all sums
        write_skills(fresh, {name: items for name, items in asked.items() if len(items) == NEW}, 0)
    pair = ["--pre", str(demo / "pre"), "--ft", str(demo / "ft")]
    rows = [f"auto={demo / 'best'}"]
    for name, method in METHODS.items():
        text = ["--calibration", str(demo / "calibration.txt")] if method.calibrated else []
        if not (fresh / name).exists():
            words = [name, *pair, *text, "--out", str(fresh / name)]
            subprocess.run([sys.executable, "-m", "surgery", *words], check=True, stdout=subprocess.DEVNULL)
        rows.append(f"{name}={fresh / name}")
    words = ["compare", *pair, *rows, "--task", str(fresh / f"{NEW_SKILL.name}.jsonl")]
    words += ["--general", str(fresh / "general"), "--batch-size", "64"]
    return subprocess.run([sys.executable, "-m", "surgery", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
