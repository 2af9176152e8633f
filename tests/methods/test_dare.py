"""DARE: a draw that depends on nothing but seed, name, model and entry, and the files that come of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import fine_tuned, read_checkpoint, tiny_llama, write_checkpoint
from helpers.command import call, refused
from helpers.reference.formulas import Bools, dare, exact, philox, same_bits
from helpers.runs import BF16, F16, F32, F64, WEIGHT, merged, models

from surgery.methods import Dare
from surgery.methods.dare import draw


def masks(method: Dare, name: str, n: int, count: int) -> list[Bools]:
    """The draw of whole tensors, at once."""
    return [draw(method.seed, method.drop_rate, name, model, 0, n) for model in range(count)]


def test_the_draw_is_philox_keyed_by_a_hash() -> None:
    """Against the generator written in integers: entry e is decided by the e-th 32-bit word."""
    key = int.from_bytes(hashlib.sha256(b"7\nlayer.weight\n1").digest()[:16], "little")
    for start in (0, 8 * 12345, 8 << 30):
        words = [
            half
            for block in range(2)
            for word in philox(key, start // 8 + block)
            for half in (word & 0xFFFFFFFF, word >> 32)
        ]
        for rate in (0.1, 0.5, 0.9):
            expected = [word >= rate * 2**32 for word in words]
            assert draw(7, rate, "layer.weight", 1, start, 16).tolist() == expected


def test_the_draw_does_not_depend_on_how_it_is_cut() -> None:
    whole = draw(0, 0.5, "x", 0, 0, 1000)
    for start, count in ((0, 1), (1, 1), (3, 500), (7, 9), (8, 16), (999, 1), (500, 0)):
        assert (draw(0, 0.5, "x", 0, start, count) == whole[start : start + count]).all()


def test_draws_are_fair_and_independent() -> None:
    n = 1 << 20
    for rate in (0.1, 0.9, 0.99):
        first = draw(0, rate, "x", 0, 0, n)
        error = 4 * (rate * (1 - rate) / n) ** 0.5
        assert abs(first.mean() - (1 - rate)) < error
        for other in (
            draw(1, rate, "x", 0, 0, n),
            draw(0, rate, "y", 0, 0, n),
            draw(0, rate, "x", 1, 0, n),
            np.roll(first, 1),
        ):
            assert abs((first & other).mean() - (1 - rate) ** 2) < error
    assert draw(0, 0.0, "x", 0, 0, n).all()
    assert not draw(0, 1 - 1e-12, "x", 0, 0, n).any()


@pytest.mark.parametrize(("rate", "lam"), [(0.9, 1.0), (0.5, 0.5), (0.0, 1.0), (0.3, -0.4)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F64, F64), (F32, BF16), (BF16, F32, F16)], ids=str)
def test_the_files_hold_the_bits_of_the_formula(
    dtypes: tuple[torch.dtype, ...], count: int, rate: float, lam: float, tmp_path: Path
) -> None:
    pre, fts = models(dtypes, count)
    method = Dare(rate, lam, seed=5)
    out = merged(tmp_path, pre, fts, method)
    for name, tensor in out.items():
        drawn = masks(method, name, tensor.numel(), count)
        expected = dare(pre[name], [ft[name] for ft in fts], drawn, rate, lam)
        assert same_bits(tensor, expected if tensor.dim() == 2 else fts[0][name]), name


def test_a_tensor_of_several_chunks(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2, large=True)
    out = merged(tmp_path, pre, fts, Dare(), workers=2)[WEIGHT]
    assert same_bits(out, dare(pre[WEIGHT], [ft[WEIGHT] for ft in fts], masks(Dare(), WEIGHT, out.numel(), 2), 0.9))


def test_the_mean_of_the_task_vector_is_preserved(tmp_path: Path) -> None:
    """Eq. 1's rescaling: the expectation of τ̂ is τ, so that the mean over many equal entries is theirs."""
    pre = {WEIGHT: torch.zeros(1000, 1000)}
    fts = [{WEIGHT: torch.full((1000, 1000), step)} for step in (0.25, 0.5)]
    out = merged(tmp_path, pre, fts, Dare())[WEIGHT].double()
    assert abs(out.mean() - 0.75) < 4 * (9 * (0.25**2 + 0.5**2) / out.numel()) ** 0.5
    values, counts = np.unique(out.numpy(), return_counts=True)
    assert values == pytest.approx([0, 2.5, 5, 7.5])
    assert counts / out.numel() == pytest.approx([0.81, 0.09, 0.09, 0.01], abs=0.002)


def test_a_rate_of_1_gives_pre(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 2)
    out = merged(tmp_path, pre, fts, Dare(1.0))
    assert all(same_bits(out[name], pre[name] if out[name].dim() == 2 else fts[0][name]) for name in out)


def test_another_seed_drops_others(tmp_path: Path) -> None:
    pre, fts = models((BF16, BF16), 1)
    found = [merged(tmp_path / str(number), pre, fts, Dare(seed=seed))[WEIGHT] for number, seed in enumerate((0, 0, 1))]
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_the_command(tmp_path: Path) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    fts = [fine_tuned(pre, seed=seed) for seed in (1, 2)]
    for name, ft in zip("ab", fts, strict=True):
        write_checkpoint(tmp_path / name, ft)
    words = ("--pre", "pre", "--ft", "a", "--ft", "b", "--drop-rate", "0.75", "--lam", "0.5", "--seed", "3")
    code, out, err = call("dare", *words, cwd=tmp_path)
    assert (code, err, out.splitlines()[-1]) == (0, "", f"Wrote {tmp_path / 'a-dare-0.75'}")
    found = read_checkpoint(tmp_path / "a-dare-0.75")
    method = Dare(0.75, 0.5, 3)
    report = json.loads((tmp_path / "a-dare-0.75/surgery-report.json").read_text())
    assert report["parameters"]["drop_rate"] == 0.75
    for line in report["tensors"]:
        name, tensor = line["name"], found[line["name"]]
        if tensor.dim() == 2:
            drawn = masks(method, name, tensor.numel(), 2)
            assert same_bits(tensor, dare(pre[name], [ft[name] for ft in fts], drawn, 0.75, 0.5))
            assert (line["action"], line["kept"]) == ("merged", None)
            moved = drawn[0] * (exact(fts[0][name]) - exact(pre[name])) + drawn[1] * (
                exact(fts[1][name]) - exact(pre[name])
            )
            assert line["pruned"] == int((moved == 0).sum())


@pytest.mark.parametrize("words", [("--drop-rate", "1.1"), ("--drop-rate", "nan"), ("--lam", "inf")])
def test_options_that_are_no_numbers_are_refused(tmp_path: Path, words: tuple[str, str]) -> None:
    for name in ("pre", "ft"):
        write_checkpoint(tmp_path / name, tiny_llama())
    refused(tmp_path, "dare", "--pre", "pre", "--ft", "ft", *words, says=(words[0],))
