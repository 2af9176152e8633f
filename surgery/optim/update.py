"""The MoFO step of one tensor: update Adam's moments, choose entries, and move them.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²                                     (MoFO paper, Algorithm 1, lines 6–7)
    θ ← (1 − lr·λ)θ − lr · m̂ / (√v̂ + ε)  for the ⌈α·n⌉ entries of the largest score   (lines 8–13)

where m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ) and λ is the weight decay. `on_cpu` passes over chunks with the kernels; `on_device` is
torch alone, for accelerators and float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.optim.adamw import adamw

from surgery.checkpoint.dtypes import Array, Floats, narrow, widen
from surgery.engines.kernels import Counted
from surgery.engines.selection import Search
from surgery.optim import noise
from surgery.optim.kernels import NOTHING, Bracket, advance, descend
from surgery.optim.largest import SAMPLE, Each, chosen, largest, largest_of_pieces, places, slices
from surgery.optim.piece import Piece

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FUSED = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Update:
    """The inputs of a step for one parameter. Tensors are flat, contiguous, this process's part, and all but param of m's dtype.

    Attributes:
        param, gradient: [n], floating point.
        m, v: [n], float32, or float64 where param is; as the last step left them.
        master: [n] like m, of which param is a rounded copy; None: param is all there is.
        k: how many entries of the whole tensor are updated, at least 1.
        piece: what part of the whole tensor this is; None: all.
        step: t, from 1.
        score: "momentum", "gradient", "mv" or "random".
        form: "adam"; or "gd", whose m is the gradient, and v nothing that is looked at.
        stochastic: round up or down to bfloat16 by chance, in proportion to the distance.
        key: seed, ordinal of the parameter, step, and number of the block where there are several, of the random numbers.
    """

    param: torch.Tensor
    gradient: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    k: int
    piece: Piece | None
    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    score: str
    stochastic: bool
    key: tuple[int, ...]
    master: torch.Tensor | None = None
    form: str = "adam"

    @property
    def all(self) -> bool:
        """Whether every entry of the whole tensor is updated."""
        return self.k == (self.piece.size if self.piece else self.param.numel())

    def numbers(self) -> tuple[float, float, float, float]:
        """Decay, rate, root and ε: of the descent as `kernels.descend` writes it."""
        beta1, beta2 = self.betas
        rate = self.lr / (1 - beta1**self.step)
        return 1 - self.lr * self.weight_decay, rate, math.sqrt(1 - beta2**self.step), self.eps

    def key_for(self, purpose: int) -> int:
        """The key of this step's random numbers for this parameter: 0 for the choice of entries, 1 for rounding."""
        return noise.key(noise.key(*self.key), purpose)

    def noise(self, positions: noise.Words, purpose: int) -> noise.Words:
        """Random words for entries, by where they lie in the whole tensor."""
        return noise.words(self.piece.positions(positions) if self.piece else positions, self.key_for(purpose))


def on_cpu(update: Update, each: Each) -> None:
    """Do the step of a parameter in the memory of the host, float32, bfloat16 or float16.

    Args:
        each: maps over chunks, perhaps in several threads; the bits of the result do not depend on it.
    """
    param, name = _array(update.param), DTYPES[update.param.dtype]
    m, v = _array(update.m), _array(update.v)
    scores, threshold, ties = _advance(update, each)

    def settle(at: slice) -> None:
        if update.master is not None:
            values: Floats = _array(update.master)[at]
        else:
            values = param[at] if name == "F32" else widen(name, param[at])
        descend(scores[at], threshold, max(ties - at.start, 0), update.numbers(), m[at], v[at], values)
        if name != "F32":
            param[at] = _dithered(values, update, at) if update.stochastic else narrow(values, name)

    list(each(settle, slices(len(m))))


def _advance(update: Update, each: Each) -> tuple[Floats, np.float32, int]:
    """Update the moments.

    Returns:
        The scores, [n], and the threshold and the ties of those that are chosen, as `optim.largest` has them.
    """
    gradient, name = _array(update.gradient), DTYPES[update.gradient.dtype]
    m, v = _array(update.m), _array(update.v)
    score = "momentum" if update.all else update.score
    key = update.key_for(0) if score == "random" else 0
    stored: Floats | None = None
    if score == "momentum":
        scores: Floats = m
    elif score == "gradient" and name == "F32":
        scores = gradient
    else:
        scores = stored = np.empty_like(m)

    def chunk(bracket: Bracket, at: slice) -> Counted:
        kept = None if stored is None else stored[at]
        return advance(score, (key, at.start), name, gradient[at], m[at], v[at], update.betas, kept, bracket)

    if update.all:
        list(each(partial(chunk, NOTHING), slices(len(m))))
        return scores, np.float32(-np.inf), len(m)
    if update.piece:
        list(each(partial(chunk, NOTHING), slices(len(m))))
        if score == "random":
            scores[:] = noise.uniform(update.noise(np.arange(len(m)), 0))
        number, ties = largest_of_pieces(torch.from_numpy(scores), update.k, update.piece)
        return scores, np.float32(number), ties
    n = len(m)
    if n <= SAMPLE:
        chunk(NOTHING, slice(0, n))
        return scores, *largest(Search(np.abs(scores)[None], n, n - update.k + 1), [], scores, each)
    at = places(n)
    drawn = np.empty(at.size, np.float32)
    # Only one filter looks at v. Random scores are as good a sample wherever they lie.
    squares = v[at].ravel() if score == "mv" else np.zeros_like(drawn)
    advance(score, (key, 0), name, gradient[at].ravel(), m[at].ravel(), squares, update.betas, drawn, NOTHING)
    search = Search(np.abs(drawn).reshape(at.shape), n, n - update.k + 1)
    passed = list(each(partial(chunk, search.bracket()), slices(n)))
    return scores, *largest(search, passed, scores, each)


def _dithered(values: Floats, update: Update, at: slice) -> Array:
    """Round values to raw bfloat16 stochastically; values that bfloat16 can hold stay as they are."""
    bits = values.view(np.uint32)
    up = (update.noise(np.arange(at.start, at.stop), 1) >> 40 & 0xFFFF).astype(np.uint32)
    return (np.where(np.isfinite(values), bits + up, bits) >> 16).astype(np.uint16)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def on_device(update: Update) -> None:
    """Do the step of a parameter of any floating type on any device; torch's fused AdamW does Adam's arithmetic."""
    param, m = update.param, update.m
    dtype = m.dtype if update.form == "adam" or m.dtype == torch.float64 else torch.float32
    target = param if update.master is None else update.master
    values, gradient = target.to(dtype, copy=True), update.gradient.to(dtype)
    if update.form == "gd":
        values.mul_(1 - update.lr * update.weight_decay).sub_(gradient, alpha=update.lr)
    else:
        adamw(
            *([values], [gradient], [m], [update.v], [], [torch.full((), update.step - 1.0, device=m.device)]),
            fused=m.device.type in FUSED,
            amsgrad=False,
            beta1=update.betas[0],
            beta2=update.betas[1],
            lr=update.lr,
            weight_decay=update.weight_decay,
            eps=update.eps,
            maximize=False,
        )
    if not update.all:
        torch.where(_mask(update, gradient), values, target.to(dtype), out=values)
    if update.master is not None:
        update.master.copy_(values)
    if update.stochastic:
        up = update.noise(torch.arange(len(m), device=m.device), 1) >> 40 & 0xFFFF
        bits = values.view(torch.int32)
        values = torch.where(values.isfinite(), bits + up.to(torch.int32) & -0x10000, bits).view(torch.float32)
    param.copy_(values)


def _mask(update: Update, gradient: torch.Tensor) -> torch.Tensor:
    if update.score == "momentum" and update.form == "adam":
        scores = update.m
    elif update.score in ("momentum", "gradient"):
        scores = gradient
    elif update.score == "mv":
        scores = torch.where(update.m == 0, 0, update.m / update.v.sqrt())
    else:
        words = update.noise(torch.arange(len(gradient), device=gradient.device), 0)
        scores = noise.uniform(words).to(gradient.dtype)
    if not update.piece:
        return chosen(scores, update.k)
    threshold, ties = largest_of_pieces(scores, update.k, update.piece)
    sizes = torch.nan_to_num(scores.abs(), nan=-math.inf, posinf=math.inf)
    mask = sizes > threshold
    mask[:ties] |= sizes[:ties] == threshold
    return mask
