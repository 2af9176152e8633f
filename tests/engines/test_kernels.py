"""The compiled kernels against their numpy definitions, and both against torch and plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import native
from surgery.checkpoint.dtypes import RAW, Array, narrow, widen
from surgery.engines import kernels
from surgery.engines.kernels import Distance
from surgery.methods import fapm, magnitude
from surgery.methods.actions import Prune

DTYPES = ("BF16", "F16", "F32")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PAIRS = [(pre, ft) for pre in DTYPES for ft in DTYPES]
# Around the C block of 256 entries, and its 16 lanes.
SIZES = (0, 1, 15, 16, 17, 255, 256, 257, 5000)
ACTIONS = {
    "fapm": Prune(fapm.score, 0.5, uses_mean=True, kernel="fapm"),
    "magnitude": Prune(magnitude.score, 0.5, kernel="magnitude"),
}
EVERY = np.arange(1 << 16, dtype=np.uint16)
compiled = pytest.mark.skipif(native.compiled is None, reason="surgery._kernels was not compiled")


def chunk(dtype: str, n: int, seed: int, *, hostile: bool = False) -> Array:
    """A raw chunk: normal numbers and zeros of both signs; when hostile, any bits, with the likes of NaN and Inf among them."""
    rng = np.random.default_rng(seed)
    if hostile:
        raw: Array = rng.integers(0, 256, n * RAW[dtype].itemsize, np.uint8).view(RAW[dtype])
        special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -6e-8, 6.5e4, 1.0], np.float32)
        where = rng.random(n) < 0.3
        raw[where] = narrow(rng.choice(special, int(where.sum())), dtype)
        return raw
    values = rng.normal(scale=0.05, size=n).astype(np.float32)
    values[rng.random(n) < 0.1] = rng.choice([0.0, -0.0])
    return narrow(values, dtype)


def near(pre_dtype: str, pre: Array, dtype: str, seed: int) -> Array:
    """pre moved by a few multiples of 1/512, often not at all: many ties."""
    steps = np.random.default_rng(seed).integers(-2, 3, len(pre)).astype(np.float32) / 512
    return narrow(widen(pre_dtype, pre) + steps, dtype)


def pair(pre_dtype: str, ft_dtype: str, n: int, hostile: bool) -> tuple[Array, Array]:
    """Raw chunks of pre and ft."""
    pre = chunk(pre_dtype, n, n, hostile=hostile)
    return pre, chunk(ft_dtype, n, n + 1, hostile=True) if hostile else near(pre_dtype, pre, ft_dtype, n)


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with the compiled kernels and with numpy."""
    with np.errstate(all="ignore"):
        with_c = call()
        with monkeypatch.context() as patch:
            patch.setattr(native, "compiled", None)
            return with_c, call()


def same_distance(one: Distance, other: Distance) -> None:
    """The same entries were summed; only the order of the float64 additions may differ."""
    assert one.differ == other.differ
    np.testing.assert_allclose((one.delta2, one.weight2), (other.delta2, other.weight2), rtol=1e-12)


def same_bytes(one: Array, other: Array) -> None:
    assert one.dtype == other.dtype
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widen_is_exact_for_every_16_bit_pattern(dtype: str) -> None:
    raw = EVERY.view(RAW[dtype])
    expected = torch.from_numpy(EVERY.view(np.int16).copy()).view(TORCH[dtype]).float().numpy()
    got = widen(dtype, raw)
    np.testing.assert_array_equal(got, expected)
    assert (np.signbit(got) == np.signbit(expected)).all()


@pytest.mark.parametrize("source", ["F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_rounds_as_torch_between_all_neighbours(dtype: str, source: str) -> None:
    stored = torch.from_numpy(EVERY.view(np.int16).copy()).view(TORCH[dtype]).double().numpy()
    grid = np.unique(stored[np.isfinite(stored)])
    middle = (grid[1:] + grid[:-1]) / 2  # ties, and what lies just beside them
    single = middle.astype(np.float32)
    beside = [np.nextafter(single, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate(
        [grid.astype(np.float32), single, *beside, np.array([1e38, 3.4e38, -7e4, np.inf, -np.inf], np.float32)]
    )
    with np.errstate(all="ignore"):
        got = narrow(values.astype(RAW[source]), dtype)
    expected = torch.from_numpy(values).to(TORCH[dtype]).view(torch.int16).numpy()
    np.testing.assert_array_equal(got.view(np.int16), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_narrow_undoes_widen_and_nan_stays_nan(dtype: str) -> None:
    raw = chunk(dtype, 4000, 3, hostile=True)
    with np.errstate(all="ignore"):
        wide = widen(dtype, raw)
        back = narrow(wide, dtype)
    number = ~np.isnan(wide)
    same_bytes(back[number], raw[number])
    assert np.isnan(widen(dtype, back[~number])).all()


@compiled
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_c_code_widens_every_pattern_exactly(dtype: str) -> None:
    """Seen from outside: the magnitudes |x − 0| that a bracket around all numbers collects, and a blend with nothing of pre."""
    expected = torch.from_numpy(EVERY.view(np.int16).copy()).view(TORCH[dtype]).float().numpy()
    raw, zero = EVERY.view(RAW[dtype]), np.zeros(len(EVERY), np.float32)
    everything = (np.float32(-np.inf), np.float32(np.inf), True)
    found = kernels.count(ACTIONS["magnitude"], np.float32(0), everything, "F32", zero, dtype, raw)
    same_bytes(found.inside, abs(expected[~np.isnan(expected)]))
    out = np.zeros(len(EVERY), np.float32)
    kernels.blend(1.0, dtype, raw, "F32", zero, out)
    np.testing.assert_array_equal(out, expected)


@compiled
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_sum(dtype: str, hostile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in SIZES:
        got, expected = both(monkeypatch, partial(kernels.abs_sum, dtype, chunk(dtype, n, n, hostile=hostile)))
        np.testing.assert_allclose(got, expected, rtol=1e-13)


@compiled
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("pre_dtype", "dtype"), PAIRS)
def test_distance(pre_dtype: str, dtype: str, hostile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in SIZES:
        pre, x = pair(pre_dtype, dtype, n, hostile)
        same_distance(*both(monkeypatch, partial(kernels.distance, pre_dtype, pre, dtype, x)))


@pytest.mark.parametrize("code", ["C", "numpy"])
def test_distance_is_what_it_says(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if code == "numpy":
        monkeypatch.setattr(native, "compiled", None)
    pre, x = np.array([3, 0, -4, 1], np.float32), np.array([3, -0.0, -2, 2], np.float32)
    assert kernels.distance("F32", pre, "F32", x) == Distance(delta2=5.0, weight2=26.0, differ=2)
    assert kernels.abs_sum("F32", pre) == 8.0


@compiled
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("pre_dtype", "ft_dtype"), PAIRS)
@pytest.mark.parametrize("method", ACTIONS)
def test_count_and_prune(
    method: str, pre_dtype: str, ft_dtype: str, hostile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, infinity = ACTIONS[method], np.float32(np.inf)
    for n in SIZES:
        pre, ft = pair(pre_dtype, ft_dtype, n, hostile)
        with np.errstate(all="ignore"):
            base = pre if pre_dtype == ft_dtype else narrow(widen(pre_dtype, pre), ft_dtype)
            score = np.sort(action.score(*kernels.task_vector(pre_dtype, pre, ft_dtype, ft), np.float32(0.04)))
        finite = score[np.isfinite(score)]
        low, high = (finite[int(q * (len(finite) - 1))] if len(finite) else np.float32(0) for q in (0.4, 0.7))
        for bracket in ((low, high), (high, high), (-infinity, -infinity), (-infinity, infinity)):
            compare_count_and_prune(monkeypatch, action, bracket, (pre_dtype, pre), base, (ft_dtype, ft))


def compare_count_and_prune(
    monkeypatch: pytest.MonkeyPatch,
    action: Prune,
    bracket: tuple[np.float32, np.float32],
    pre: tuple[str, Array],
    base: Array,
    ft: tuple[str, Array],
) -> None:
    """C and numpy agree on the counts and scores of a bracket, and on the output above its upper end."""
    mean = np.float32(0.04)
    for collect in (True, False):
        got, expected = both(monkeypatch, partial(kernels.count, action, mean, (*bracket, collect), *pre, *ft))
        assert (got.above_low, got.above_high) == (expected.above_low, expected.above_high)
        same_bytes(got.inside, expected.inside)
        assert len(got.inside) == (got.above_low - got.above_high if collect else 0)
    outs: list[Array] = []

    def call() -> kernels.Pruned:
        outs.append(np.zeros_like(ft[1]))
        return kernels.prune(action, mean, bracket[1], *pre, base, *ft, outs[-1])

    done, defined = both(monkeypatch, call)
    same_bytes(*outs)
    same_distance(done.before, defined.before)
    np.testing.assert_allclose(done.kept2, defined.kept2, rtol=1e-12)
    assert (done.changed, done.kept) == (defined.changed, defined.kept)


@pytest.mark.parametrize("code", ["C", "numpy"])
@pytest.mark.parametrize(
    ("low", "high", "kept", "inside", "changed"),
    [
        (0.5, 2.0, [0, 0, 0, 1, 0], [1.0, 2.0], 1),
        (0.0, np.inf, [0, 0, 0, 0, 0], [1.0, 2.0, 4.0], 0),
        (-np.inf, -np.inf, [1, 1, 1, 1, 0], [], 3),
    ],
)
def test_count_and_prune_are_what_they_say(
    code: str,
    low: float,
    high: float,
    kept: list[int],
    inside: list[float],
    changed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if code == "numpy":
        monkeypatch.setattr(native, "compiled", None)
    action, zero, bracket = ACTIONS["magnitude"], np.float32(0), (np.float32(low), np.float32(high), True)
    pre, ft = np.array([1, 1, 1, 1, np.nan], np.float32), np.array([1, 2, -1, 5, 0], np.float32)
    assert kernels.count(action, zero, bracket, "F32", pre, "F32", ft).inside.tolist() == inside
    out = np.zeros(5, np.float32)
    done = kernels.prune(action, zero, bracket[1], "F32", pre, pre, "F32", ft, out)
    same_bytes(out, np.where(kept, ft, pre))
    assert (done.kept, done.changed) == (sum(kept), changed)


@compiled
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("pre_dtype", "ft_dtype"), PAIRS)
@pytest.mark.parametrize("alpha", [0.3, 1 / 3, 1e-8])
def test_blend(alpha: float, pre_dtype: str, ft_dtype: str, hostile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in SIZES:
        pre, ft = pair(pre_dtype, ft_dtype, n, hostile)
        outs: list[Array] = []

        def call(pre: Array = pre, ft: Array = ft, outs: list[Array] = outs) -> tuple[Distance, Distance]:
            outs.append(np.zeros_like(ft))
            return kernels.blend(alpha, pre_dtype, pre, ft_dtype, ft, outs[-1])

        got, expected = both(monkeypatch, call)
        values = [widen(ft_dtype, out) for out in outs]
        number = ~np.isnan(values[1])
        same_bytes(outs[0][number], outs[1][number])
        assert np.isnan(values[0][~number]).all()
        same_distance(got[0], expected[0])
        same_distance(got[1], expected[1])


@compiled
@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("pre_dtype", "ft_dtype"), PAIRS)
@pytest.mark.parametrize("sample", [(0, 0), (1 << 18, 1), (3 << 18, 5), (256, 8)])
def test_compare(
    sample: tuple[int, int], pre_dtype: str, ft_dtype: str, hostile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in SIZES:
        pre, ft = pair(pre_dtype, ft_dtype, n, hostile)
        bins: list[tuple[Array, Array]] = []

        def call(pre: Array = pre, ft: Array = ft, bins: list[tuple[Array, Array]] = bins) -> kernels.Compared:
            bins.append((np.zeros(kernels.BINS, np.int64), np.zeros(kernels.BINS, np.int64)))
            return kernels.compare(pre_dtype, pre, ft_dtype, ft, sample, bins[-1])

        got, expected = both(monkeypatch, call)
        np.testing.assert_allclose((got.delta2, got.weight2), (expected.delta2, expected.weight2), rtol=1e-12)
        assert (got.same, got.infinite) == (expected.same, expected.infinite)
        assert (got.max_delta, got.max_ratio) == (expected.max_delta, expected.max_ratio)
        for with_c, with_numpy in zip(*bins, strict=True):
            np.testing.assert_array_equal(with_c[:0x7F81], with_numpy[:0x7F81])
            assert with_c.sum() == with_numpy.sum()


@compiled
@given(
    values=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=600),
    shift=st.integers(0, 8),
)
@settings(max_examples=150, deadline=None)
def test_compare_on_any_float32(values: list[tuple[float, float]], shift: int) -> None:
    pre, ft = np.array(values, np.float32).T.copy()
    found = []
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        for kernel in (native.compiled, None):
            patch.setattr(native, "compiled", kernel)
            bins = np.zeros(kernels.BINS, np.int64), np.zeros(kernels.BINS, np.int64)
            measured = kernels.compare("F32", pre, "F32", ft, (512, shift), bins)
            counts = [part[:0x7F80].tolist() for part in bins]
            found.append((measured.same, measured.infinite, measured.max_delta, measured.max_ratio, counts))
    assert found[0] == found[1]


@pytest.mark.parametrize("shift", range(9))
def test_one_entry_of_each_stretch_is_drawn_wherever_chunks_begin(shift: int) -> None:
    n = 1 << 12
    every = np.arange(n, dtype=np.float32)
    found = []
    for size in (n, 256):
        bins = np.zeros(kernels.BINS, np.int64), np.zeros(kernels.BINS, np.int64)
        for start in range(0, n, size):
            part = every[start : start + size].copy()
            kernels.compare("F32", np.zeros_like(part), "F32", part, (start, shift), bins)
        found.append(bins[0])
    assert found[0].sum() == n >> shift
    np.testing.assert_array_equal(found[0], found[1])


@compiled
@given(
    values=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=40),
    ends=st.tuples(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False)),
    method=st.sampled_from(sorted(ACTIONS)),
)
@settings(max_examples=150, deadline=None)
def test_count_and_prune_on_any_float32(
    values: list[tuple[float, float]], ends: tuple[float, float], method: str
) -> None:
    pre, ft = np.array(values, np.float32).T.copy()
    low, high = sorted(map(np.float32, ends))
    with pytest.MonkeyPatch.context() as patch:
        compare_count_and_prune(patch, ACTIONS[method], (low, high), ("F32", pre), pre, ("F32", ft))
