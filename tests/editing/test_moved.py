"""Distances and checksums measured on two checkpoints are those that the engine counts, and numpy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import fine_tuned, tiny_llama, write_checkpoint

from surgery.diff.measure import prepare
from surgery.editing.job import prepare as prepare_job
from surgery.editing.moved import moved
from surgery.editing.run import run
from surgery.methods import Magnitude

EMBEDDING = "model.embed_tokens.weight"


def test_a_line_is_that_of_a_run_that_keeps_all(tmp_path: Path) -> None:
    pre = tiny_llama(torch.float32)
    ft = fine_tuned(pre) | {
        "only.in.ft.weight": torch.ones(3, 4),
        "model.norm.weight": pre["model.norm.weight"].clone(),
    }
    for name in (EMBEDDING, "lm_head.weight"):  # a larger vocabulary
        ft[name] = torch.cat([ft[name], torch.ones(5, ft[name].shape[1])])
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    both = prepare(str(tmp_path / "pre"), str(tmp_path / "ft"))
    lines = {line["name"]: line for line in moved(both.items)}
    report = run(prepare_job(tmp_path / "pre", tmp_path / "ft", Magnitude(0.0), out=tmp_path / "out"))
    assert lines.keys() == {line["name"] for line in report["tensors"]}
    for line in report["tensors"]:
        mine = lines[line["name"]]
        assert (mine["checksum"], mine["differ"]) == (line["checksum"], line["differ"]), line["name"]
        if line["distance_after"] is None:
            assert mine["distance_after"] is None
        else:
            assert mine["distance_after"] == pytest.approx(line["distance_after"], rel=1e-12)
    assert lines["model.norm.weight"]["action"] == "unchanged"
    old, new = (side[EMBEDDING].double().numpy() for side in (pre, ft))
    wanted = np.linalg.norm(new[: len(old)] - old) / np.linalg.norm(old)
    assert lines[EMBEDDING]["distance_after"] == pytest.approx(wanted, rel=1e-6)
