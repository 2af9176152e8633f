"""MoFO against the literal reference, against torch's AdamW, and against itself in every place where it can run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference.mofo import Mofo, filtered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import native
from surgery.errors import OptionError
from surgery.optim import MoFO, mofo
from surgery.optim.mofo import how_many
from surgery.optim.update import on_device

# With these betas and gradients of few bits, moments are exact in float32 and float64 alike, and ties are real.
EXACT = (0.5, 0.75)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PLACES = ["compiled", "numpy", "device"]


def go_to(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels, numpy, or what accelerators do, on the CPU."""
    if place == "numpy":
        monkeypatch.setattr(native, "compiled", None)
    elif place == "device":
        monkeypatch.setattr(mofo, "on_cpu", lambda update, each: on_device(update))


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(word).numpy().copy()


def trained(p: torch.Tensor, gradients: list[torch.Tensor], **options: Any) -> tuple[torch.nn.Parameter, MoFO]:
    parameter = torch.nn.Parameter(p.clone())
    optimizer = MoFO([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("score", ["momentum", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_is_the_reference_s_and_what_it_does_not_choose_keeps_its_bits(
    place: str, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_to(place, monkeypatch)

    @settings(max_examples=40, deadline=None)
    @given(
        steps=st.integers(1, 40).flatmap(
            lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4)
        ),
        alpha=st.sampled_from(["1e-09", "0.07", "0.15", "0.5", "0.93", "1.0"]),
        decay=st.sampled_from([0.0, 0.125]),
    )
    def check(steps: list[list[int]], alpha: str, decay: float) -> None:
        n = len(steps[0])
        start = torch.from_numpy(np.random.default_rng(n).normal(size=n)).to(dtype)
        reference = Mofo(start.double().numpy(), alpha, 0.01, *EXACT, 1e-8, decay)
        parameter = torch.nn.Parameter(start.clone())
        optimizer = MoFO(
            [parameter], lr=0.01, betas=EXACT, alpha=float(alpha), weight_decay=decay, filter=score, rounding="master"
        )
        for gradient in steps:
            before = bits(parameter)
            parameter.grad = torch.tensor(gradient, dtype=dtype)
            optimizer.step()
            chosen = np.array(reference.step(np.array(gradient, float), score))
            assert (bits(parameter) == before)[~chosen].all()
            state = optimizer.state[parameter]
            exact = state.get("master", parameter.detach())
            np.testing.assert_allclose(exact.double().numpy(), reference.theta, rtol=2e-5, atol=1e-6)
            np.testing.assert_array_equal(state["exp_avg"].double().numpy(), reference.m)
            np.testing.assert_array_equal(state["exp_avg_sq"].double().numpy(), reference.v)
            moved = (exact.double().numpy() != start.double().numpy()) & (reference.theta != start.double().numpy())
            assert (moved == (reference.theta != start.double().numpy())).all(), "what was chosen has moved"

    check()


@pytest.mark.parametrize("place", PLACES)
def test_the_mv_filter_ranks_by_m_over_root_v(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(place, monkeypatch)
    rng = np.random.default_rng(0)
    gradients = [rng.choice([-4.0, -1.0, 0.0, 0.25, 2.0], size=300) for _ in range(3)]
    reference = Mofo(np.ones(300), "0.3", 0.01, *EXACT, 1e-8, 0.0)
    parameter = torch.nn.Parameter(torch.ones(300))
    optimizer = MoFO([parameter], lr=0.01, betas=EXACT, alpha=0.3, filter="mv")
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        m, v = (optimizer.state[parameter][name].numpy() for name in ("exp_avg", "exp_avg_sq"))
        with np.errstate(all="ignore"):
            ratio = np.where(m == 0, np.float32(0), m / np.sqrt(v))
        assert filtered(ratio.tolist(), "0.3") == (parameter.detach() != before).tolist()
        reference.step(gradient, "mv")
    assert np.isclose(parameter.detach().numpy(), reference.theta, atol=1e-6).mean() > 0.98, "but for rounded ties"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1000,), (700, 300), (1100, 1000)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_tensors_of_every_size_choose_as_sorting_does(
    place: str, shape: tuple[int, ...], ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted whole, sampled in one chunk, and in several chunks."""
    go_to(place, monkeypatch)
    rng = np.random.default_rng(1)
    gradient = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    if ties:
        gradient = (gradient * 2).round() / 4
    parameter, optimizer = trained(torch.ones(shape), [gradient], alpha=0.15)
    momentum = optimizer.state[parameter]["exp_avg"].flatten().abs().numpy()
    order = np.lexsort((np.arange(momentum.size), -momentum))[: math.ceil(0.15 * momentum.size)]
    moved = (parameter.detach() != 1).flatten().numpy()
    expected = np.zeros(momentum.size, bool)
    expected[order] = True
    expected &= momentum != 0
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("place", PLACES)
def test_nan_counts_as_the_smallest(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(place, monkeypatch)
    nan = math.nan
    for gradient, alpha in [([nan, 1.0, nan, 0.0], 0.5), ([nan, 1.0, nan, 0.0], 0.75), ([nan] * 4, 0.5)]:
        parameter, _ = trained(torch.arange(1.0, 5), [torch.tensor(gradient)], alpha=alpha)
        k = round(4 * alpha)
        expected = [i for i, chosen in enumerate(filtered(gradient, str(alpha))) if chosen and math.isnan(gradient[i])]
        assert parameter.isnan().nonzero().flatten().tolist() == expected
        assert len(expected) == max(0, k - sum(not math.isnan(g) for g in gradient))


@pytest.mark.parametrize("score", mofo.FILTERS)
def test_the_compiled_kernels_and_numpy_give_the_same_bits(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(600, 500) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.randn(600, 500).to(dtype)
        results = []
        for place in ("compiled", "numpy"):
            with monkeypatch.context() as patch:
                go_to(place, patch)
                given_gradients = [g.to(dtype) for g in gradients]
                options = {"weight_decay": 0.1, "rounding": "stochastic", "filter": score}
                results.append(trained(start, given_gradients, **options)[0])
        np.testing.assert_array_equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("place", PLACES)
def test_alpha_1_is_adamw(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(place, monkeypatch)
    torch.manual_seed(0)
    start, gradients = torch.randn(300, 20), [torch.randn(300, 20) for _ in range(5)]
    parameter, _ = trained(start, gradients, lr=0.01, alpha=1.0, weight_decay=0.1)
    other = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([other], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        other.grad = gradient.clone()
        adamw.step()
    torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_form_of_gradient_descent_moves_the_largest_gradients_by_themselves(dtype: torch.dtype) -> None:
    """θ ← (1 − lr·λ)θ − lr · g for the ⌈α·n⌉ largest |g|, ties to the lowest index; no state but the step's number."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=33)
    parameter = torch.nn.Parameter(torch.from_numpy(theta).to(dtype))
    rounding = "master" if dtype in (torch.bfloat16, torch.float16) else "nearest"
    optimizer = MoFO([parameter], lr=0.125, alpha=0.2, form="gd", weight_decay=0.5, rounding=rounding)
    theta = parameter.detach().double().numpy().copy()
    for _ in range(3):
        gradient = rng.integers(-3, 4, size=33).astype(float)
        before = bits(parameter)
        parameter.grad = torch.from_numpy(gradient).to(dtype)
        optimizer.step()
        chosen = np.array(filtered(gradient.tolist(), "0.2"))
        theta = np.where(chosen, theta - 0.125 * 0.5 * theta - 0.125 * gradient, theta)
        exact = optimizer.state[parameter].get("master", parameter.detach())
        np.testing.assert_allclose(exact.double().numpy(), theta, rtol=1e-6, atol=1e-6)
        assert (bits(parameter) == before)[~chosen].all()
    assert optimizer.state[parameter].keys() <= {"step", "master"}
    with pytest.raises(OptionError, match="keeps no moments"):
        MoFO([parameter], form="gd", filter="mv")


def test_the_number_of_entries_is_that_of_the_decimal_alpha() -> None:
    assert (0.07 * 100, math.ceil(0.07 * 100)) == (7.000000000000001, 8), "which is why"
    assert [how_many(0.07, 100), how_many(0.15, 20), how_many(0.15, 21), how_many(1e-12, 5), how_many(1, 5)] == [
        7,
        3,
        4,
        1,
        5,
    ]


def test_one_dimensional_tensors_are_filtered_unless_told_otherwise() -> None:
    gradient = torch.arange(1.0, 11)
    assert int((trained(torch.zeros(10), [gradient], alpha=0.2)[0] != 0).sum()) == 2
    assert int((trained(torch.zeros(10), [gradient], alpha=0.2, filter_1d=False)[0] != 0).sum()) == 10
    assert int((trained(torch.zeros(2, 5), [gradient.view(2, 5)], alpha=0.2, filter_1d=False)[0] != 0).sum()) == 2


@pytest.mark.parametrize("place", PLACES)
def test_the_random_filter_draws_anew_each_step_and_is_fair(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(place, monkeypatch)
    parameter = torch.nn.Parameter(torch.zeros(20, 50))
    optimizer = MoFO([parameter], lr=1.0, betas=(0.0, 0.0), eps=0.0, alpha=0.1, filter="random", seed=3)
    for _ in range(200):
        parameter.grad = -torch.ones(20, 50)  # each update adds 1
        before = parameter.detach().clone()
        optimizer.step()
        assert int((parameter != before).sum()) == 100
    times = parameter.detach()
    assert 15 < float(times.mean()) < 25
    assert 3 < float(times.std()) < 5.5, "binomial: 4.24"
    other, _ = trained(torch.zeros(20, 50), [torch.ones(20, 50)], alpha=0.1, filter="random", seed=4)
    first, _ = trained(torch.zeros(20, 50), [torch.ones(20, 50)], alpha=0.1, filter="random", seed=3)
    assert not torch.equal(other != 0, first != 0)


@pytest.mark.parametrize("place", PLACES)
def test_stochastic_rounding_keeps_small_updates_on_average_and_leaves_the_rest(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_to(place, monkeypatch)
    start = torch.ones(100, 200, dtype=torch.bfloat16)
    gradient = -torch.rand(100, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    # The grid above 1 is 1/128; each of the steps adds 1/1024.
    nearest, _ = trained(start, [gradient] * 64, lr=1 / 1024, alpha=0.5)
    assert torch.equal(nearest, start)
    parameter, optimizer = trained(start, [gradient] * 64, lr=1 / 1024, alpha=0.5, rounding="stochastic")
    chosen = gradient.abs() >= gradient.abs().flatten().kthvalue(10000).values
    assert abs(float(parameter.detach()[gradient.abs() > gradient.abs().median()].double().mean()) - 1.0625) < 1e-3
    assert torch.equal(parameter[~chosen], start[~chosen])
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations after which the host waits for a device, since they bring it a number or a length."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", mofo.FILTERS)
@pytest.mark.parametrize("rounding", mofo.ROUNDINGS)
def test_a_step_never_waits_for_the_device(score: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what runs on accelerators; the number of the step, which the host has, is all that it looks at."""
    go_to("device", monkeypatch)
    start, gradient = torch.randn(300, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    _, optimizer = trained(start, [gradient], filter=score, rounding=rounding)
    with Waits() as waits:
        optimizer.step()
    assert len(waits.found) == 1, waits.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("score", mofo.FILTERS)
@pytest.mark.parametrize("rounding", mofo.ROUNDINGS)
@pytest.mark.parametrize("shape", [(300,), (3000, 1000)], ids=str)
def test_a_step_never_waits_for_the_gpu(score: str, rounding: str, shape: tuple[int, ...]) -> None:
    parameter = torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16())
    optimizer = MoFO([parameter], filter=score, rounding=rounding)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_parameter_that_is_not_contiguous_is_updated_like_one_that_is() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(30, 40), (torch.randn(30, 40) * 2).round()
    plain, _ = trained(start, [gradient] * 3)
    turned = torch.nn.Parameter(start.t().contiguous().t())
    optimizer = MoFO([turned])
    for _ in range(3):
        turned.grad = gradient.t().contiguous().t()
        optimizer.step()
    assert not turned.is_contiguous()
    assert torch.equal(turned, plain)


def test_no_state_beyond_adamw_s() -> None:
    parameter, optimizer = trained(torch.ones(5, 5, dtype=torch.bfloat16), [torch.ones(5, 5, dtype=torch.bfloat16)])
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr must be 0 or greater"),
        ({"lr": math.nan}, "finite"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"filter": "best"}, "momentum, gradient, mv, random"),
        ({"rounding": "up"}, "nearest, stochastic, master"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        MoFO([torch.nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(OptionError, match=says):
        MoFO([{"params": [torch.nn.Parameter(torch.ones(2))], **options}])


def test_parameters_that_cannot_be_filtered_are_refused() -> None:
    with pytest.raises(OptionError, match="complex64"):
        MoFO([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(OptionError, match="float16"):
        MoFO([torch.nn.Parameter(torch.ones(2, dtype=torch.float16))], rounding="stochastic")
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(OptionError, match="sparse=False"):
        MoFO(embedding.parameters()).step()
    # What DeepSpeed ZeRO-1 and -2 do with the optimizer that they are given.
    optimizer = MoFO(torch.nn.Linear(3, 4).parameters())
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(16))]
    with pytest.raises(OptionError, match="flattened"):
        optimizer.step()
