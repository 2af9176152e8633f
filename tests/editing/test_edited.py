"""An edit that is read without being written: byte for byte the checkpoint that the command writes, and the same counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.runs import MAKE

from surgery.checkpoint.checksum import weights_fingerprint
from surgery.checkpoint.source import open_both
from surgery.checkpoint.tensor import read_bytes
from surgery.editing.edited import Edited
from surgery.editing.job import Job, plan, prepare, replan
from surgery.editing.report import as_json
from surgery.editing.run import run
from surgery.methods import METHODS, Method
from surgery.methods.wanda import Norm

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def norms(ft: Tensors) -> dict[str, Norm]:
    """Of every other matrix of the blocks, so that some are scored by |Δ| alone."""
    names = [name for name in ft if ".layers." in name and ft[name].ndim == 2][::2]
    random = np.random.default_rng(0)
    return {name: Norm(random.random(ft[name].shape[1], np.float32), False, 7) for name in names}


def make(name: str, ft: Tensors) -> Method:
    options: dict[str, dict[str, Any]] = {
        "wanda": {"norms": norms(ft)},
        "hma": {"ratios": (0.3, 0.1)},
        "fapm": {"group": "expert"},
    }
    return MAKE[name](**options.get(name, {}))


def sides(kind: str) -> tuple[Tensors, Tensors]:
    """A pair of tiny models, of the kinds that are read in ways of their own."""
    pre = tiny_llama(torch.float32 if kind == "types" else torch.bfloat16)
    if kind == "experts":
        pre[EXPERTS] = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    if kind == "tied":
        del pre[HEAD]
    ft = fine_tuned(pre)
    if kind == "types":  # a pre in float32, an ft in bfloat16 with norms in float32
        ft = {name: value if value.ndim == 1 else value.bfloat16() for name, value in ft.items()}
    if kind == "tied":  # and stored by ft
        ft[HEAD] = (ft[EMBEDDING].float() * 1.01).bfloat16()
    if kind == "grown":
        for name in (HEAD, EMBEDDING):
            ft[name] = torch.cat([ft[name], torch.ones(5, 16).bfloat16()])
    return pre, ft


def same(edited: Edited, job: Job, folder: Path) -> None:
    """What is read is what is written."""
    run(job)
    written = read_checkpoint(folder)
    assert edited.checkpoint.tensors.keys() == written.keys()
    for name, tensor in written.items():
        read = edited.checkpoint.tensors[name]
        assert read.shape == tuple(tensor.shape)
        assert read_bytes(read) == tensor.contiguous().view(torch.uint8).numpy().tobytes(), name
    report = json.loads((folder / "surgery-report.json").read_text())
    assert as_json(edited.totals) == report["totals"]
    assert report["totals"]["differ"] > 0
    _, (opened,) = open_both(str(folder.with_name("pre")), str(folder))
    assert weights_fingerprint(edited.checkpoint) == weights_fingerprint(opened)


@pytest.mark.parametrize("kind", ["plain", "experts", "tied", "grown", "types"])
@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_and_totals_are_those_of_the_command(name: str, kind: str, tmp_path: Path) -> None:
    pre, ft = sides(kind)
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft, shards=2)
    job = prepare(tmp_path / "pre", tmp_path / "ft", make(name, ft), out=tmp_path / "out")
    same(Edited(plan(tmp_path / "pre", tmp_path / "ft", make(name, ft))), job, tmp_path / "out")


@pytest.mark.parametrize("name", METHODS)
def test_a_job_that_is_planned_again_is_the_one_that_is_planned_at_once(name: str, tmp_path: Path) -> None:
    """A sweep opens the pair once, for another method at another setting."""
    pre, ft = sides("plain")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    first = plan(tmp_path / "pre", tmp_path / "ft", MAKE["half-reset" if name == "fapm" else "fapm"]())
    job = prepare(tmp_path / "pre", tmp_path / "ft", make(name, ft), out=tmp_path / "out")
    same(Edited(replan(first, make(name, ft))), job, tmp_path / "out")


def test_totals_need_no_reading_before(tmp_path: Path) -> None:
    pre, ft = sides("plain")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    job = prepare(tmp_path / "pre", tmp_path / "ft", MAKE["fapm"](sparsity=0.5), out=tmp_path / "out")
    assert as_json(Edited(job).totals) == run(job)["totals"]
