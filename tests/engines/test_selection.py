"""The exact r-th smallest score: a streamed `Search` against a sort, and the choice in memory against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference.formulas import SCORES, bits
from helpers.reference.formulas import prune as reference_prune
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.engines import resident
from surgery.engines.resident import keeping, threshold
from surgery.engines.selection import Search, rank
from surgery.methods import fapm, magnitude
from surgery.methods.actions import Prune

Floats = NDArray[np.float32]
INF = np.float32(np.inf)


def search(sample: Floats, scores: Floats, r: int) -> tuple[np.float32, int]:
    """The threshold that a search finds when all the scores stream past, and how many passes it took."""
    found, passes = Search(sample, scores.size, r), 0
    while not found.found:
        low, high, collect = found.bracket()
        passes += 1
        assert passes <= 1000, "the search does not end"
        above_low, above_high = scores > low, scores > high
        inside = scores[above_low & ~above_high] if collect else scores[:0]
        found.narrow(int(above_low.sum()), int(above_high.sum()), inside)
    return found.threshold, passes


def literal(scores: Floats, r: int) -> np.float32:
    """The r-th smallest; NaN counts as −∞."""
    value: np.float32 = np.sort(np.where(np.isnan(scores), -INF, scores))[r - 1]
    return value


@given(n=st.integers(0, 10**10), sparsity=st.floats(0, 1))
@example(n=5, sparsity=0.5)
@example(n=7, sparsity=0.5)
def test_rank_is_pythons_round(n: int, sparsity: float) -> None:
    assert rank(sparsity, n) == round(sparsity * n)
    assert 0 <= rank(sparsity, n) <= n


number = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, float("inf"), float("-inf"), float("nan")]),
)


@given(
    scores=st.lists(number, min_size=1, max_size=60), sample=st.lists(number, min_size=1, max_size=60), data=st.data()
)
@settings(max_examples=400, deadline=None)
def test_search_is_exact_whatever_the_sample(scores: list[float], sample: list[float], data: st.DataObject) -> None:
    """The sample may have nothing to do with the scores: it may cost passes, never the result."""
    values, r = np.array(scores, np.float32), data.draw(st.integers(1, len(scores)))
    blocks = np.array(sample, np.float32)[None]
    if blocks.size == values.size:  # a sample of that size claims to be the group
        blocks = values[None]
    assert search(blocks, values, r)[0] == literal(values, r)


def normal(rng: np.random.Generator, n: int) -> Floats:
    return rng.normal(size=n).astype(np.float32)


def coarse(rng: np.random.Generator, n: int) -> Floats:
    """A few hundred values, none an atom by far."""
    return (rng.normal(size=n) * 100).round().astype(np.float32)


def half_zero(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.5, 0, rng.normal(size=n)).astype(np.float32)


def thin_minus_infinity(rng: np.random.Generator, n: int) -> Floats:
    """−∞ too rarely to be an atom."""
    return np.where(rng.random(n) < 0.005, -INF, rng.normal(size=n)).astype(np.float32)


def much_nan(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)).astype(np.float32)


def plus_infinity(rng: np.random.Generator, n: int) -> Floats:
    return np.where(rng.random(n) < 0.005, INF, rng.normal(size=n)).astype(np.float32)


def atoms(rng: np.random.Generator, n: int) -> Floats:
    """Forty atoms beside each other, with a continuum between."""
    return np.where(rng.random(n) < 0.8, rng.integers(0, 40, n), rng.random(n) * 40).astype(np.float32)


def constant(rng: np.random.Generator, n: int) -> Floats:
    return np.full(n, 0.25, np.float32)


SHAPES = {
    shape.__name__: shape
    for shape in (normal, coarse, half_zero, thin_minus_infinity, much_nan, plus_infinity, atoms, constant)
}
SHARES = (1e-5, 0.001, 0.0025, 0.004, 0.3, 0.5, 0.51, 0.9, 0.996, 0.999, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_search_with_an_honest_sample_takes_a_pass_or_two(shape: str) -> None:
    rng = np.random.default_rng(3)
    scores = SHAPES[shape](rng, 100_000)
    for share in SHARES:
        sample = scores.reshape(-1, 100)[rng.choice(1000, 128, replace=False)]
        got, passes = search(sample, scores, max(1, round(share * scores.size)))
        assert got == literal(scores, max(1, round(share * scores.size)))
        assert passes <= 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_search_with_a_foreign_sample_ends_exactly(shape: str, other: str) -> None:
    rng = np.random.default_rng(4)
    scores, sample = SHAPES[shape](rng, 5_000), SHAPES[other](rng, 3_200).reshape(32, 100)
    for share in SHARES[1::2]:
        r = max(1, round(share * scores.size))
        got, passes = search(sample, scores, r)
        assert got == literal(scores, r)
        assert passes <= 100


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("edge", [2500, 7500])
def test_search_at_the_edges_of_an_atom(edge: int, offset: int) -> None:
    """Ranks just outside, at, and just inside a tie of 5,000."""
    scores = np.concatenate([np.linspace(-1, -0.001, 2500), np.zeros(5000), np.linspace(0.001, 1, 2500)]).astype(
        np.float32
    )
    sample = np.random.default_rng(5).permutation(scores)[:2000].reshape(20, 100)
    assert search(sample, scores, edge + offset)[0] == literal(scores, edge + offset)


def test_a_complete_sample_needs_no_pass() -> None:
    scores = np.array([3, np.nan, -np.inf, 1, 1, 2], np.float32)
    for r in range(1, 7):
        assert search(scores[None], scores, r) == (literal(scores, r), 0)


CPU = torch.device("cpu")


@given(scores=st.lists(number, min_size=1, max_size=60), data=st.data())
@settings(max_examples=200, deadline=None)
def test_threshold_in_memory(scores: list[float], data: st.DataObject) -> None:
    values, r = np.array(scores, np.float32), data.draw(st.integers(0, len(scores)))
    got = threshold(torch.from_numpy(values).__getitem__, len(values), r, CPU)
    assert got == (float(literal(values, r)) if r else float("-inf"))


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_in_memory_of_several_chunks(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "CHUNK", 70_000)
    values = SHAPES[shape](np.random.default_rng(6), 300_000)
    for r in [max(1, round(share * values.size)) for share in SHARES]:
        assert threshold(torch.from_numpy(values).__getitem__, len(values), r, CPU) == literal(values, r)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "bfloat16"), ("float64", "float64")]
)
@pytest.mark.parametrize(("method", "score"), [("fapm", fapm.score), ("magnitude", magnitude.score)])
def test_prune_in_memory_is_the_reference(method: str, score: Any, dtypes: tuple[str, str], sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(37, 19, generator=generator).round(decimals=1).to(getattr(torch, dtypes[0]))
    steps = torch.randint(-2, 3, pre.shape, generator=generator) / 64
    ft = (pre.double() + steps).to(getattr(torch, dtypes[1]))
    before = pre.clone(), ft.clone()
    keep = keeping(Prune(score, sparsity, uses_mean=method == "fapm"), pre.flatten(), ft.flatten())
    out = torch.where(keep(slice(0, pre.numel())).view_as(pre), ft, pre.to(ft.dtype))
    assert method in SCORES
    assert torch.equal(bits(out), bits(reference_prune(method, pre, ft, sparsity)))
    assert torch.equal(bits(pre), bits(before[0]))
    assert torch.equal(bits(ft), bits(before[1]))
