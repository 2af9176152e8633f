"""MoFO, the momentum-filtered optimizer ("MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM Fine-Tuning").

Adam that in each step updates, of every tensor, only the entries with the largest momentum, so that the model ends nearer to
where it began. `surgery.optim.update` has the formulas.

Where the paper leaves something open: α·n is rounded up; ties go to the lowest index (its Remark 1); decoupled weight decay is
for the updated entries only, so that every other entry keeps its bits; one-dimensional tensors are filtered too (its D.4), other
than in the authors' code; Q, K and V are filtered apart where a model stores them in one tensor (`blocks`). An entry whose
momentum is NaN counts as the smallest.

`form="gd"` is the filter on plain gradient descent: θ ← θ − lr · g ⊙ FLT_α(g), greedy block coordinate descent as such.

Memory: AdamW's two moments in float32, whatever the parameters' type, and in a step a few tensors more. The time of a
step on a CPU, beside torch's fused AdamW, is in docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from surgery.errors import OptionError
from surgery.methods.scope import finite, one_of
from surgery.optim.blocks import Blocks
from surgery.optim.largest import CHUNK
from surgery.optim.part import parts
from surgery.optim.piece import is_spread, piece_of
from surgery.optim.update import DTYPES, Update, on_cpu, on_device

FILTERS = ("momentum", "gradient", "mv", "random")
FORMS = ("adam", "gd")
ROUNDINGS = ("nearest", "stochastic", "master")
# What FSDP1 and DeepSpeed ZeRO-3 leave on a parameter that they flatten or take away.
_FLATTENED = ("_is_flat_param", "_fsdp_flattened", "ds_id")


class MoFO(torch.optim.Optimizer):
    """Adam that updates only the ⌈α·n⌉ entries with the largest momentum of a tensor of n entries; the others keep their bits.

    For parameters on any device, in float32, float64, bfloat16 or float16, whole or as DTensors (FSDP2, tensor parallelism): the
    filter is over the whole logical tensor, and the result is that of a single process. A parameter without a gradient is left
    alone. Every argument but `params` may differ between parameter groups.

    Args:
        params: parameters, or groups of them, as for any torch optimizer.
        lr: the learning rate, ≥ 0.
        betas: β₁ and β₂, in [0, 1).
        eps: ε, ≥ 0.
        weight_decay: λ ≥ 0, decoupled; of the updated entries only.
        alpha: the share of entries that is updated, in (0, 1], as a decimal number: 0.07 of 100 entries is 7. The paper advises
            0.05 to 0.2.
        filter: "momentum": |m|; or the paper's Table 3: "gradient": |g|; "mv": |m| / √v, 0 where m = 0; "random": anew each step.
        filter_1d: False updates one-dimensional tensors (norms, biases) in full, as the authors' code does.
        rounding: of a bfloat16 or float16 parameter. "nearest": small updates get lost; "stochastic": up or down by chance, only
            for bfloat16; "master": state keeps a float32 copy, which takes the updates.
        seed: of "random" and "stochastic". What they draw depends on the seed, the step, and the entry alone.
        form: "adam", or "gd": θ ← θ − lr · g for the ⌈α·n⌉ entries of the largest |g|, with no moments.
        blocks: parameter -> the blocks that it holds, each of which is filtered by itself: see `surgery.optim.fused_blocks`.

    Raises:
        OptionError: an argument outside its range, a parameter that is not floating point, or one that was flattened by FSDP1 or
            DeepSpeed; in a step also a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 0.15,
        filter: str = "momentum",
        filter_1d: bool = True,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        form: str = "adam",
        blocks: Mapping[torch.Tensor, Blocks] | None = None,
    ) -> None:
        self._blocks = dict(blocks or {})
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "filter": filter,
            "filter_1d": filter_1d,
            "rounding": rounding,
            "seed": seed,
            "form": form,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the arguments that differ from the optimizer's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except OptionError:
            self.param_groups.pop()
            raise
        # To notice that a wrapper has put something else in the place of the parameters.
        group["dims"] = [p.ndim for p in group["params"]]
        group["blocks"] = [self._blocks.get(p) for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict()`. The moments keep their dtype, also for parameters of 16 bits."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(saved, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and value.dtype != p.dtype:  # which torch has cast
                    self.state[p][name] = value.to(p.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: computes the loss and its gradients again; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alone: list[Update] = []
        ordinal = -1
        for group in self.param_groups:
            _check_whole(group)
            for p, blocks in zip(group["params"], group["blocks"], strict=True):
                ordinal += 1
                if p.grad is None or p.numel() == 0:
                    continue
                for update, write_back in self._updates(group, p, blocks, ordinal):
                    on_host = update.param.device.type == "cpu" and update.m.dtype == torch.float32
                    if not on_host or update.form == "gd":
                        on_device(update)
                    elif update.piece is not None:
                        on_cpu(update, map)
                    elif write_back is None:
                        alone.append(update)
                    else:
                        _in_threads([update])
                    if write_back:
                        write_back()
        _in_threads(alone)
        return loss

    def _updates(
        self, group: dict[str, Any], p: torch.Tensor, blocks: Blocks | None, ordinal: int
    ) -> Iterator[tuple[Update, Callable[[], object] | None]]:
        """The updates of a parameter, one a block, each with a function that copies its result back where it is of a copy."""
        if p.grad is None or p.grad.layout != torch.strided:
            raise OptionError("MoFO takes no sparse gradient; make the embedding with sparse=False.")
        state = self._state(group, p)
        state["step"] += 1
        step, gradient = int(state["step"]), p.grad
        if is_spread(p) and gradient.placements != p.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=p.placements)  # type: ignore[attr-defined]
        held = {"param": _local(p), "gradient": _local(gradient)}
        # Without moments the momentum is the gradient.
        held |= {"m": held["gradient"], "v": held["gradient"]} if group["form"] == "gd" else {}
        names = {"exp_avg": "m", "exp_avg_sq": "v", "master": "master"}
        held |= {name: _local(state[key]) for key, name in names.items() if key in state}
        for number, part in enumerate(parts(held, piece_of(p), tuple(p.shape), blocks)):
            n = part.piece.size if part.piece else part.tensors["param"].numel()
            if n == 0:
                continue
            flat = {name: tensor.reshape(-1) for name, tensor in part.tensors.items()}
            update = Update(
                **flat,
                k=how_many(group["alpha"], n) if p.ndim != 1 or group["filter_1d"] else n,
                piece=part.piece,
                step=step,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                score=group["filter"],
                form=group["form"],
                stochastic=group["rounding"] == "stochastic" and p.dtype == torch.bfloat16,
                key=(group["seed"], ordinal, step, *([number] if blocks else [])),
            )
            yield update, part.write_back(flat)

    def _state(self, group: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter, made where there is none yet."""
        state: dict[str, Any] = self.state[p]
        if state:
            return state
        state["step"] = torch.tensor(0.0)
        if group["form"] == "adam":
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            state["exp_avg"] = torch.zeros_like(p, dtype=wide, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide, memory_format=torch.contiguous_format)
        if group["rounding"] == "master" and p.element_size() < 4:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return state


def how_many(alpha: float, n: int) -> int:
    """⌈α·n⌉, with α the decimal number that Python prints for it: no product is rounded up past a whole number."""
    return min(n, math.ceil(Fraction(repr(float(alpha))) * n))


def _in_threads(updates: list[Update]) -> None:
    """Do all updates with as many threads as torch has: on chunks of a large tensor at once, or on several tensors."""
    threads, entries = torch.get_num_threads(), sum(update.param.numel() for update in updates)
    if threads == 1 or entries <= CHUNK:
        for update in updates:
            on_cpu(update, map)
        return
    share = entries / threads / 2
    with ThreadPoolExecutor(threads) as pool:
        for update in updates:
            if update.param.numel() > share:
                on_cpu(update, pool.map)
        list(pool.map(partial(on_cpu, each=map), [u for u in updates if u.param.numel() <= share]))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_spread(tensor) else tensor.detach()  # type: ignore[attr-defined]


def _check(group: dict[str, Any]) -> None:
    finite("lr", float(group["lr"]))
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise OptionError(f"{name} must be 0 or greater, not {group[name]}.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise OptionError(f"betas must be from 0 up to, but not including, 1; they are {group['betas']}.")
    if not 0 < group["alpha"] <= 1:
        raise OptionError(
            f"alpha, the share of entries that is updated, must be above 0 and at most 1, not {group['alpha']}."
        )
    one_of("filter", group["filter"], FILTERS)
    one_of("rounding", group["rounding"], ROUNDINGS)
    one_of("form", group["form"], FORMS)
    if group["form"] == "gd" and group["filter"] == "mv":
        raise OptionError(
            'form="gd" keeps no moments, so filter="mv" cannot be had; use "momentum", "gradient" or "random".'
        )
    for p in group["params"]:
        if p.dtype not in DTYPES and p.dtype != torch.float64:
            raise OptionError(f"MoFO takes parameters in float32, float64, bfloat16 or float16, not in {p.dtype}.")
        if group["rounding"] == "stochastic" and p.dtype == torch.float16:
            raise OptionError('rounding="stochastic" is for bfloat16, and a parameter is in float16; use "master".')


def _check_whole(group: dict[str, Any]) -> None:
    """Raise OptionError if a wrapper has flattened the parameters, so that tensors cannot be told apart."""
    if [p.ndim for p in group["params"]] != group["dims"] or any(
        hasattr(p, mark) for p in group["params"] for mark in _FLATTENED
    ):
        raise OptionError(
            "MoFO filters whole tensors, and FSDP1 or DeepSpeed ZeRO has flattened these parameters; use FSDP2 (fully_shard)."
        )
