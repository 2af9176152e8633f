"""Does any method's default beat the model that `surgery auto` found, on questions that nobody has seen?

    surgery demo --out build/demo
    python benchmarks/auto_demo.py build/demo

makes new held-out questions of the demo's skills, those behind the ones that the demo asked, edits the demo's pair with each
method at its default, and compares all of them with `best`, the model that `surgery auto` wrote at the end of the demo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from surgery.demo.run import Effort
from surgery.demo.skills import NEW_SKILL, evaluation_items, general_skills
from surgery.methods import METHODS

ASKED = Effort().items
NEW = 400


def main(demo: Path) -> int:
    fresh = demo / "fresh"
    (fresh / "general").mkdir(parents=True, exist_ok=True)
    for skill in (*general_skills(0), NEW_SKILL):
        items = evaluation_items(skill, ASKED + NEW)[ASKED:]
        if len(items) < NEW:  # facts and sums: the demo has asked all of them, or nearly
            continue
        lines = ({"prompt": " ".join(item.prompt), "completion": " " + " ".join(item.answer)} for item in items)
        path = fresh / ("" if skill is NEW_SKILL else "general") / f"{skill.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    pair = ["--pre", str(demo / "pre"), "--ft", str(demo / "ft")]
    rows = [f"auto={demo / 'best'}"]
    for name, method in METHODS.items():
        text = ["--calibration", str(demo / "calibration.txt")] if method.calibrated else []
        out = fresh / name
        if not out.exists():
            words = [name, *pair, *text, "--out", str(out)]
            subprocess.run([sys.executable, "-m", "surgery", *words], check=True, stdout=subprocess.DEVNULL)
        rows.append(f"{name}={out}")
    tasks = [
        "--task",
        str(fresh / f"{NEW_SKILL.name}.jsonl"),
        "--general",
        str(fresh / "general"),
        "--batch-size",
        "64",
    ]
    words = ["compare", *pair, *rows, *tasks, "--batch-size", "64"]
    return subprocess.run([sys.executable, "-m", "surgery", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
