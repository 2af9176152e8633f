"""What every method must do, over every entry of the registry."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import Tensors, fine_tuned, tiny_llama, write_checkpoint
from helpers.reference.formulas import same_bits
from helpers.runs import MAKE, edit

from surgery import native
from surgery.editing.job import prepare
from surgery.editing.run import run
from surgery.methods import METHODS, Method


@dataclass(frozen=True)
class Case:
    """A method as a user would run it, the label of that, and where its output is all of ft and all of pre (None: nowhere)."""

    usual: dict[str, Any]
    label: str
    ft: dict[str, Any]
    pre: dict[str, Any] | None


CASES = {
    "fapm": Case({"sparsity": 0.9}, "fapm-0.9", {"sparsity": 0.0}, {"sparsity": 1.0}),
    "magnitude": Case({"sparsity": 0.9}, "magnitude-0.9", {"sparsity": 0.0}, {"sparsity": 1.0}),
    "relative": Case({"sparsity": 0.9}, "relative-0.9", {"sparsity": 0.0}, {"sparsity": 1.0}),
    "breadcrumbs": Case({"sparsity": 0.9}, "breadcrumbs-0.9", {"sparsity": 0.0, "top": 0.0}, {"sparsity": 1.0}),
    "salience": Case({}, "salience-1.5", {"threshold": -1e9}, {"threshold": 1e9}),
    "half-reset": Case({"ratio": 0.5, "seed": 3}, "half-reset-0.5", {"ratio": 0.0}, {"ratio": 1.0}),
    "hma": Case({"ratios": (0.3, 0.2)}, "hma-0.3-0.2", {"ratios": (0.0,)}, {"ratios": (1.0,)}),
    "lines": Case({"alpha": 0.3}, "lines-0.3", {"alpha": 1.0}, None),
    "dg-hard": Case({}, "dg-hard-1", {"scale": 0.0}, {"scale": 1e9}),
    "intruder": Case({"epsilon": 0.99}, "intruder-0.75", {"factor": 1.0}, None),
    "ties": Case({"sparsity": 0.8}, "ties-0.8", {"sparsity": 0.0}, {"sparsity": 1.0}),
    "dare": Case({"drop_rate": 0.9}, "dare-0.9", {"drop_rate": 0.0}, {"drop_rate": 1.0}),
    # Without norms: |Δ|, row by row.
    "wanda": Case({"sparsity": 0.9}, "wanda-0.9", {"sparsity": 0.0}, {"sparsity": 1.0}),
}
COMPUTING = {
    "hma",
    "lines",
    "dg-hard",
    "intruder",
    "dare",
}  # whose entries are not all stored numbers of one of the two
WHOLE = {"half-reset", "hma", "lines"}  # which edit whole tensors, norms too
every_method = pytest.mark.parametrize("name", METHODS)


def test_every_method_is_in_the_table() -> None:
    assert METHODS.keys() == CASES.keys()


def usual(name: str) -> Method:
    return MAKE[name](**CASES[name].usual)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "surgery-report.json"
    }


def with_zeros(tensors: Tensors) -> Tensors:
    """Some 0 and −0 in each tensor, some Δ = 0 with them."""
    zeroed = {}
    for name, tensor in tensors.items():
        flat = tensor.clone().flatten()
        flat[::7], flat[3::11] = 0.0, -0.0
        zeroed[name] = flat.view(tensor.shape)
    return zeroed


@every_method
def test_an_untouched_model_stays_as_it_is(name: str, tmp_path: Path) -> None:
    pre = with_zeros(tiny_llama())
    assert same(edit(tmp_path / "x", pre, pre, usual(name)), pre)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_two_ends(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pre = with_zeros(tiny_llama(dtype))
    ft = with_zeros(fine_tuned(pre))
    assert same(edit(tmp_path / "ft", pre, ft, MAKE[name](**CASES[name].ft)), ft)
    if (options := CASES[name].pre) is None:
        return
    all_pre = edit(tmp_path / "pre", pre, ft, MAKE[name](**options))
    outside = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    for tensor in ft:
        kept = (
            tensor in outside if name == "half-reset" else name not in WHOLE and ft[tensor].dim() == 1  # --rest ft
        )
        assert same_bits(all_pre[tensor], (ft if kept else pre)[tensor]), tensor


@pytest.mark.parametrize("name", sorted(METHODS.keys() - COMPUTING))
def test_every_entry_of_a_selection_is_one_of_the_two(name: str, tmp_path: Path) -> None:
    pre = with_zeros(tiny_llama())
    ft = with_zeros(fine_tuned(pre))
    out = edit(tmp_path / "x", pre, ft, usual(name))
    for tensor in ft:
        words = [side[tensor].view(torch.int16) for side in (out, pre, ft)]
        assert ((words[0] == words[1]) | (words[0] == words[2])).all()
    assert not same(out, ft)
    assert not same(out, pre)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"dare"}))  # which throws dice for each entry
def test_one_element_and_all_ties(name: str, tmp_path: Path) -> None:
    layer = "model.layers.{}.self_attn.q_proj.weight"
    pre = {layer.format(0): torch.ones(1, 1), layer.format(1): torch.ones(4, 5), layer.format(2): torch.zeros(3, 3)}
    ft = {key: tensor + 0.5 for key, tensor in pre.items()}
    out = edit(tmp_path / "x", pre, ft, usual(name))
    for key in pre:
        assert bool((out[key] == out[key].flatten()[0]).all()), "tied entries share their fate"
    if name in ("fapm", "magnitude", "ties"):
        assert same(out, pre)


@every_method
def test_inputs_are_not_touched(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    edit(tmp_path / "x", pre, fine_tuned(pre), usual(name), shards=2)
    after = digests(tmp_path / "x" / "pre"), digests(tmp_path / "x" / "ft")
    write_checkpoint(tmp_path / "pre", pre, shards=2)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre), shards=2)
    assert after == (digests(tmp_path / "pre"), digests(tmp_path / "ft"))


@every_method
def test_workers_and_repetition_do_not_change_a_byte(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    found = []
    for number, workers in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        edit(folder, pre, ft, usual(name), shards=2, workers=workers)
        written = digests(folder / "out")
        del written["README.md"]  # names its inputs
        found.append(written)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4  # two shards, index, config.json


@every_method
def test_sharding_and_order_do_not_change_a_tensor(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    ft = fine_tuned(pre)
    backwards = [dict(reversed(side.items())) for side in (pre, ft)]
    one = edit(tmp_path / "1", pre, ft, usual(name), shards=1)
    three = edit(tmp_path / "3", pre, ft, usual(name), shards=3)
    assert same(one, three)
    assert same(one, edit(tmp_path / "4", backwards[0], backwards[1], usual(name), shards=4))


@pytest.mark.skipif(native.compiled is None, reason="surgery._kernels was not compiled")
@every_method
@pytest.mark.parametrize(
    ("pre_dtype", "ft_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_numpy_and_compiled_kernels_write_the_same_bytes(
    name: str, pre_dtype: torch.dtype, ft_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_zeros(tiny_llama(pre_dtype, width=32))
    ft = {key: tensor.to(ft_dtype) for key, tensor in fine_tuned(base).items()}
    # One tensor above the size that is its own sample.
    large = "model.layers.0.mlp.down_proj.weight"
    base[large] = torch.randn(400, 801, generator=torch.Generator().manual_seed(0)).to(pre_dtype)
    ft[large] = (base[large] + torch.randn(400, 801, generator=torch.Generator().manual_seed(1)) / 64).to(ft_dtype)
    compiled = edit(tmp_path / "c", base, ft, usual(name))
    monkeypatch.setattr(native, "compiled", None)
    assert same(compiled, edit(tmp_path / "numpy", base, ft, usual(name)))


@every_method
def test_a_tensor_without_a_base_integers_and_buffers_are_copied(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.1.mlp.adapter_of_its_own.weight": torch.rand(3, 3),
        "steps": torch.tensor([7]),
    }
    ft = fine_tuned(pre) | extra
    base = pre | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "steps": torch.tensor([3])}
    out = edit(tmp_path / "x", base, ft, usual(name))
    assert same({key: out[key] for key in extra}, extra)


@every_method
def test_the_label_names_the_output(name: str, tmp_path: Path) -> None:
    pre = tiny_llama()
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "ft", fine_tuned(pre))
    label = CASES[name].label
    job = prepare(tmp_path / "pre", tmp_path / "ft", usual(name))
    assert job.out == tmp_path.resolve() / f"ft-{label}"
    run(job)
    assert (tmp_path / f"ft-{label}" / "model.safetensors").exists()
