"""Documents as results.json holds them, with made-up but plausible numbers, for the tests of pages and plots."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

MEASURES: list[dict[str, Any]] = [
    {
        "name": "GSM8K",
        "role": "task",
        "kind": "share",
        "items": 1319,
        "settings": {"metric": "numeric", "data": "gsm8k_test.jsonl"},
    },
    {
        "name": "WikiText-2",
        "role": "general",
        "kind": "perplexity",
        "items": 141,
        "settings": {"length": 1024, "data": "wiki.txt"},
    },
    {"name": "BLiMP", "role": "general", "kind": "share", "items": 2000, "settings": {"normalised": False}},
    {"name": "PMC answers", "role": "general", "kind": "loss", "items": 500, "settings": {"prompt_field": "question"}},
]
# What the scores are at no and at full forgetting.
BEST, WORST = (0.021, 17.4, 0.812, 2.31), (0.021, 24.9, 0.744, 2.72)

# Names that would do something in a page if they were not text there.
HOSTILE = (
    '</script><img src=x onerror="window.hacked=1">',
    "<script>window.hacked=1</script>",
    "\"><svg onload='window.hacked=1'>",
    "'onmouseover='window.hacked=1",
    "<!--<script>",
    "$data ${script} $$",
    "a\u202eb\ud800\x1b[31m\u2028",
)


def row(
    label: str,
    retention: float,
    forgetting: float,
    *,
    role: str = "other",
    method: str | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """A row that keeps so much of ft's 7.6% and forgets so much."""
    lost = forgetting / 0.12
    task = 0.076 * retention
    values = (task, *(good + lost * (bad - good) for good, bad in zip(BEST[1:], WORST[1:], strict=True)))
    widths = (0.009, 0.8, 0.012, 0.06)
    scores: dict[str, dict[str, float | None]] = {}
    for measure, value, width in zip(MEASURES, values, widths, strict=True):
        p = abs(1 - retention) + 0.0004 if measure["role"] == "task" else 0.03
        scores[measure["name"]] = {"value": value, "low": value - width, "high": value + width}
        scores[measure["name"]]["p"] = None if role == "ft" else p
    return {
        "label": label,
        "checkpoint": f"out/{label}",
        "role": role,
        "method": method,
        "parameters": parameters or None,
        "command": ["surgery", method, "--pre", "pre", "--ft", "ft", "--out", f"out/{label}"] if method else None,
        "fingerprint": hashlib.sha256(label.encode()).hexdigest(),
        "scores": scores,
        "transitions": {},
        "downstream": task,
        "retention": retention,
        "average": 0.9 - forgetting,
        "forgetting": forgetting,
        "retention_low": retention - 0.06,
        "retention_high": retention + 0.06,
        "forgetting_low": forgetting - 0.008,
        "forgetting_high": forgetting + 0.008,
        "distance": None if role == "pre" else 0.01 + 0.02 * retention,
        "effective_sparsity": None if role == "pre" else parameters.get("sparsity", 0.0),
        "pareto": False,
    }


def document(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as a document, the Pareto-optimal ones of them marked."""
    for mine in rows:
        beaten = any(
            other["retention"] >= mine["retention"]
            and other["forgetting"] <= mine["forgetting"]
            and (other["retention"], other["forgetting"]) != (mine["retention"], mine["forgetting"])
            for other in rows
        )
        mine["pareto"] = not beaten
    side = {"repo": None, "folder": "/models/SmolLM2-135M"}
    return {
        "command": [
            "surgery",
            kind,
            "--pre",
            "SmolLM2-135M",
            "--ft",
            "SmolLM2-135M-GSM8K",
            "--task",
            "it's gsm8k.jsonl",
            "--report",
            "r",
        ],
        "versions": {"surgery": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "notes": ["12 answers of GSM8K were cut at 256 tokens."],
        "kind": kind,
        "pre": {**side, "typed": "SmolLM2-135M"},
        "ft": {**side, "typed": "SmolLM2-135M-GSM8K"},
        "measures": MEASURES,
        "rows": rows,
        "seconds": 4210.0,
    }


def comparison() -> dict[str, Any]:
    """Two ends and 16 checkpoints of eleven methods."""
    return document(
        "compare",
        [
            row("pre", 0.28, 0.0, role="pre"),
            row("ft", 1.0, 0.121, role="ft"),
            row("ft-fapm-0.75", 0.985, 0.041, method="fapm", sparsity=0.75, scope="all"),
            row("ft-fapm-0.9", 0.934, 0.018, method="fapm", sparsity=0.9, scope="all"),
            row("ft-fapm-0.95", 0.862, 0.009, method="fapm", sparsity=0.95, scope="all"),
            row("ft-magnitude-0.75", 0.991, 0.078, method="magnitude", sparsity=0.75, scope="all"),
            row("ft-magnitude-0.9", 0.962, 0.049, method="magnitude", sparsity=0.9, scope="all"),
            row("ft-wanda-0.9", 0.951, 0.052, method="wanda", sparsity=0.9, scope="all"),
            row("ft-half-reset-0.5", 0.872, 0.047, method="half-reset", ratio=0.5, seed=0, level="category"),
            row("ft-hma-0.5", 0.978, 0.012, method="hma", ratios=[0.5]),
            row("ft-hma-0.3-0.5-0.7", 0.945, 0.010, method="hma", ratios=[0.3, 0.5, 0.7]),
            row("ft-hma-0.3-0.2-0.1", 1.012, 0.063, method="hma", ratios=[0.3, 0.2, 0.1]),
            row("ft-ties-0.8", 0.897, 0.033, method="ties", sparsity=0.8, lam=1.0),
            row("ft-dare-0.9", 0.958, 0.119, method="dare", drop_rate=0.9, lam=1.0, seed=0),
            row("train-mofo", 0.967, 0.036, method="mofo", alpha=0.15),
            row("train-hft", 0.925, 0.058, method="hft", alpha=None),
            row("train-lora-16", 0.842, 0.029, method="adamw", lora=16),
            row("train-l2-1e-3", 0.803, 0.021, method="adamw", l2=1e-3),
        ],
    )


def sweep() -> dict[str, Any]:
    """FAPM and magnitude from 0.5 to 0.99, HMA triples of three means, Half-Reset at three ratios and two seeds."""
    rows = [row("pre", 0.28, 0.0, role="pre"), row("ft", 1.0, 0.121, role="ft")]
    for step in range(11):
        sparsity = min(round(0.5 + 0.05 * step, 2), 0.99)
        rows.append(
            row(
                f"fapm-{sparsity}",
                1.01 - 0.6 * sparsity**9,
                0.121 * (1 - sparsity**1.6),
                method="fapm",
                sparsity=sparsity,
            )
        )
        rows.append(
            row(
                f"magnitude-{sparsity}",
                1.0 - 0.7 * sparsity**14,
                0.121 * (1 - sparsity**6),
                method="magnitude",
                sparsity=sparsity,
            )
        )
    for middle in (0.2, 0.5, 0.8):
        for slope in (-0.15, 0.0, 0.15):
            ratios = [round(middle - slope, 2), middle, round(middle + slope, 2)]
            rows.append(
                row(
                    f"hma-{'-'.join(map(str, ratios))}",
                    1.02 - 0.75 * middle**3 + slope / 10,
                    0.121 * (1 - middle) ** 1.8 + abs(slope) / 40,
                    method="hma",
                    ratios=ratios,
                )
            )
    for ratio in (0.3, 0.5, 0.7):
        for seed in (0, 1):
            rows.append(
                row(
                    f"half-reset-{ratio}-s{seed}",
                    1.0 - 0.3 * ratio + 0.02 * seed,
                    0.121 * (1 - ratio) + 0.004 * seed,
                    method="half-reset",
                    ratio=ratio,
                    seed=seed,
                )
            )
    return document("sweep", rows)


def hostile() -> dict[str, Any]:
    """A sweep in which every text is an attack."""
    document = sweep()
    document["measures"] = copy.deepcopy(document["measures"])
    for number, measure in enumerate(document["measures"]):
        name = HOSTILE[number] + str(number)
        for row in document["rows"]:
            row["scores"][name] = row["scores"].pop(measure["name"])
        measure.update(name=name, settings={HOSTILE[0]: HOSTILE[1], "b": list(HOSTILE)})
    for number, row in enumerate(document["rows"]):
        row["label"] = HOSTILE[number % len(HOSTILE)] + str(number)
        row["method"] = row["method"] and HOSTILE[len(row["method"]) % len(HOSTILE)] + row["method"]
        row["command"] = list(HOSTILE)
        row["parameters"] = row["parameters"] and {**row["parameters"], HOSTILE[0]: HOSTILE[number % 2]}
    document["command"] = ["surgery", *HOSTILE]
    document["versions"] = dict.fromkeys(HOSTILE, HOSTILE[0])
    document["notes"] = list(HOSTILE)
    document["pre"]["typed"], document["ft"]["repo"] = HOSTILE[0], HOSTILE[1]
    return document
