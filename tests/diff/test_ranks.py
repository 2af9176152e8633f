"""`surgery diff --ranks` against the singular value decompositions of whole matrices."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, tiny_llama, write_checkpoint
from helpers.command import call, refused
from helpers.reference.formulas import exact, intruder_vectors

PAIR = ("--pre", "pre", "--ft", "ft")
LAYER = "model.layers.{}.{}.weight"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Tensors, Tensors]:
    """Of one module a strong Δ of two directions, of one noise, one that did not move, and two stacked experts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pre = tiny_llama(torch.float32, width=24) | {STACKED: random(2, 12, 30)}
    ft = {name: tensor.clone() for name, tensor in pre.items()}
    for layer in range(2):
        ft[LAYER.format(layer, "self_attn.q_proj")] += random(24, 2) @ random(2, 24)
        ft[LAYER.format(layer, "mlp.down_proj")] += 0.001 * random(24, 72)
    ft[STACKED] += random(2, 12, 30)
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", ft)
    return pre, ft


def test_every_number_is_that_of_a_decomposition(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    pre, ft = pair
    code, out, err = call("diff", *PAIR, "--ranks", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    lines = {line["name"]: line for line in json.loads(out)["tensors"]}
    assert lines.keys() == {name for name in ft if ft[name].dim() > 1}
    for name, line in lines.items():
        before, after = (side[name].reshape(-1, *side[name].shape[-2:]) for side in (pre, ft))
        delta = exact(after.float() - before.float()).reshape(after.shape)
        counts = [intruder_vectors(*both, 10, 0.5)[0].sum() for both in zip(before, after, strict=True)]
        assert line["intruders"] == sum(counts)
        assert line["matrices"] == len(after)
        if not delta.any():
            assert (line["stable_rank"], line["spectrum"]) == (None, [])
            continue
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        total = squares.sum(axis=1)
        assert line["stable_rank"] == pytest.approx((total / squares[:, 0]).mean(), rel=1e-6)
        assert line["energy_1"] == pytest.approx((squares[:, 0] / total).mean(), rel=1e-6)
        assert line["energy_k"] == pytest.approx((squares[:, :10].sum(axis=1) / total).mean(), rel=1e-6)
        assert line["spectrum"][0] == [1, pytest.approx(np.sqrt(squares[:, 0]).mean(), rel=1e-6)]
        assert line["spectrum"][-1][0] == squares.shape[1]
    assert lines[LAYER.format(1, "self_attn.q_proj")]["intruders"] == 2
    assert lines[LAYER.format(1, "self_attn.q_proj")]["stable_rank"] < 2.1
    assert lines[LAYER.format(1, "mlp.down_proj")]["stable_rank"] > 5


def test_the_table_the_csv_and_the_picture(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    code, out, err = call("diff", *PAIR, "--ranks", "--csv", "ranks.csv", cwd=tmp_path)
    assert (code, err) == (0, "")
    (row,) = (line.split() for line in out.splitlines() if line.strip().startswith("self_attn.q_proj"))
    assert (row[1], row[4], row[5]) == ("2", "100.0%", "3")
    assert call("diff", *PAIR, "--ranks", "--csv", "ranks.csv", cwd=tmp_path)[0] == 0, "its own table is replaced"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "ranks.csv").read_text())))
    assert {row["module"] for row in rows} >= {"self_attn.q_proj", "mlp.down_proj"}
    pytest.importorskip("matplotlib")
    assert call("diff", *PAIR, "--ranks", "--plot", "ranks.svg", cwd=tmp_path)[0] == 0
    assert "self_attn.q_proj" in (tmp_path / "ranks.svg").read_text()


def test_one_tensor_and_what_is_no_matrix(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    name = LAYER.format(0, "self_attn.q_proj")
    code, out, _ = call("diff", *PAIR, "--ranks", "--tensor", name, "--json", cwd=tmp_path)
    assert (code, [line["name"] for line in json.loads(out)["tensors"]]) == (0, [name])
    refused(tmp_path, "diff", *PAIR, "--ranks", "--tensor", "model.norm.weight", says=("no matrix", "--ranks"))


def test_numbers_that_are_none_are_said(pair: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    _, ft = pair
    name = LAYER.format(0, "self_attn.q_proj")
    ft[name][0, 0] = float("inf")
    write_checkpoint(tmp_path / "broken", ft)
    code, out, _ = call("diff", "--pre", "pre", "--ft", "broken", "--ranks", "--json", cwd=tmp_path)
    document = json.loads(out)
    assert code == 0
    assert document["notes"] == [f"NaN or Inf: {name} have no spectrum."]
