"""What METHODS.md says, in plain numpy and Python, without a line of `surgery`.

Tensors come in as torch's, because torch knows bfloat16; the arithmetic is numpy's. float32 expressions are evaluated from left
to right, as they stand in METHODS; `fapm_score64` is the same formula without any rounding worth the name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Scorer = Callable[[Tensor, Tensor], F32]


def exact(tensor: Tensor) -> F64:
    """The values, flat, without rounding."""
    return tensor.double().flatten().numpy()


def task_vector(pre: Tensor, ft: Tensor) -> F32:
    """Δ = ft − pre, computed in float32 from exactly upcast inputs: one rounding."""
    if torch.float64 in (pre.dtype, ft.dtype):
        return (exact(ft) - exact(pre)).astype(np.float32)
    return exact(ft).astype(np.float32) - exact(pre).astype(np.float32)


def mean_abs(pre: Tensor) -> np.float32:
    """mean(|W_pre|), accumulated in float64, then float32."""
    return np.float32(math.fsum(abs(exact(pre))) / pre.numel())


def fapm_score(pre: Tensor, ft: Tensor) -> F32:
    """S = |Δ| − mean(|W_pre|) · |Δ| / |W_pre|."""
    delta = abs(task_vector(pre, ft))
    weight = abs(exact(pre).astype(np.float32))
    with np.errstate(all="ignore"):
        score: F32 = delta - mean_abs(pre) * delta / weight
    score[weight == 0] = -np.inf
    score[delta == 0] = 0
    return score


def fapm_score64(pre: Tensor, ft: Tensor) -> F64:
    """The same in float64."""
    delta, weight = abs(exact(ft) - exact(pre)), abs(exact(pre))
    with np.errstate(all="ignore"):
        score: F64 = delta - weight.mean() * delta / weight
    score[weight == 0] = -np.inf
    score[delta == 0] = 0
    return score


def magnitude_score(pre: Tensor, ft: Tensor) -> F32:
    """S = |Δ|."""
    return abs(task_vector(pre, ft))


def relative_score(pre: Tensor, ft: Tensor) -> F32:
    """S = |Δ| / |W_pre|; 0 where Δ = 0, and otherwise what IEEE makes of a division by 0."""
    delta, weight = abs(task_vector(pre, ft)), abs(exact(pre).astype(np.float32))
    score = np.zeros(delta.size, np.float32)
    with np.errstate(all="ignore"):
        np.divide(delta, weight, out=score, where=delta != 0)
    return score


SCORES: dict[str, Scorer] = {"fapm": fapm_score, "magnitude": magnitude_score, "relative": relative_score}


def kept(score: NDArray[Any], sparsity: float, top: float = 0.0) -> Bools:
    """r = round(s · n); t = the r-th smallest; an entry is kept where score > t; with r = 0 all are kept.

    So at the other end: k = round(top · n); u = the k-th largest; an entry is kept where score < u.
    """
    r, k = round(sparsity * score.size), round(top * score.size)
    keep = np.ones(score.size, bool)
    if r:
        keep &= score > np.sort(score)[r - 1]
    if k:
        keep &= score < np.sort(score)[-k]
    return keep


def pruned(pre: Tensor, ft: Tensor, keep: Bools) -> Tensor:
    """The bits of ft where kept, elsewhere the bits of pre, cast once to ft's dtype."""
    out = pre.to(ft.dtype).flatten().clone()
    chosen = torch.from_numpy(np.flatnonzero(keep))
    out[chosen] = ft.flatten()[chosen]
    return out.reshape(ft.shape)


def prune(method: str, pre: Tensor, ft: Tensor, sparsity: float) -> Tensor:
    """A whole pruning method on one tensor."""
    return pruned(pre, ft, kept(SCORES[method](pre, ft), sparsity))


def hma_part(parts: int, layer: int, layers: int) -> int:
    """Layer i is in part ⌊P · i / L⌋."""
    return math.floor(parts * layer / layers)


def blend(pre: Tensor, ft: Tensor, alpha: float) -> Tensor:
    """out = α · pre + (1 − α) · ft in float32, cast to ft's dtype; where the two agree, what they agree on."""
    a, b = exact(pre).astype(np.float32), exact(ft).astype(np.float32)
    mixed = np.float32(alpha) * a + np.float32(1 - alpha) * b
    mixed = np.where(a == b, b, mixed)
    return torch.from_numpy(mixed).to(ft.dtype).reshape(ft.shape)


def salience_score(pre: Tensor, ft: Tensor) -> F64:
    """|Δ| · KL(softmax(row of ft) ‖ softmax(row of pre)), flat, in float64."""
    p, q = (torch.softmax(side.double(), dim=-1) for side in (ft, pre))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    score: F64 = ((ft.double() - pre.double()).abs() * divergence).flatten().numpy()
    return score


def salience_limit(score: NDArray[Any], spread: float) -> float:
    """median + spread · (Q3 − Q1), where the q-quantile is the sorted score number ⌊q · (n − 1)⌋, from 0."""
    ordered = np.sort(score)
    q1, median, q3 = (ordered[math.floor(q * (score.size - 1))] for q in (0.25, 0.5, 0.75))
    return float(median + spread * (q3 - q1))


def distance_ratio(x: Tensor, pre: Tensor) -> float | None:
    """‖θ_k − θ0_k‖ / ‖θ0_k‖; None where the base is zero."""
    below = math.sqrt(math.fsum(exact(pre) ** 2))
    return math.sqrt(math.fsum((exact(x) - exact(pre)) ** 2)) / below if below else None


def mean_distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """D(θ, θ0) = mean over tensors of ‖θ_k − θ0_k‖ / ‖θ0_k‖, for pairs (θ_k, θ0_k)."""
    ratios = [ratio for x, pre in pairs if (ratio := distance_ratio(x, pre)) is not None]
    return math.fsum(ratios) / len(ratios)


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, for comparisons that tell −0 from 0 and one NaN from another."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(words[tensor.itemsize]) if tensor.is_floating_point() else tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes, of the same type and shape."""
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(bits(one), bits(other)))


def trimmed(pre: Tensor, ft: Tensor, sparsity: float) -> F32:
    """τ̂: the task vector, 0 where it is among the round(sparsity · n) smallest or tied with the last of them."""
    delta = task_vector(pre, ft)
    return np.where(kept(abs(delta), sparsity), delta, np.float32(0))


def ties(pre: Tensor, fts: list[Tensor], sparsity: float, lam: float = 1.0) -> Tensor:
    """TIES, Algorithm 1: γ = sgn(Σ τ̂), τ_m = the mean of the τ̂ ≠ 0 with that sign, out = pre + λ · τ_m."""
    vectors = [trimmed(pre, ft, sparsity) for ft in fts]
    gamma = np.sign(_sum(vectors))
    voters = [(vector != 0) & (np.sign(vector) == gamma) for vector in vectors]
    count = np.sum(voters, axis=0)
    total = _sum([np.where(voter, vector, np.float32(0)) for voter, vector in zip(voters, vectors, strict=True)])
    return _added(pre, fts, voters, total / np.maximum(count, 1).astype(np.float32), lam)


def dare(pre: Tensor, fts: list[Tensor], masks: list[Bools], drop_rate: float, lam: float = 1.0) -> Tensor:
    """DARE: out = pre + λ / (1 − p) · Σ m · τ, for masks m that are False where an entry is dropped."""
    vectors = [np.where(mask, task_vector(pre, ft), np.float32(0)) for ft, mask in zip(fts, masks, strict=True)]
    return _added(pre, fts, [vector != 0 for vector in vectors], _sum(vectors), lam / (1 - drop_rate))


def _sum(vectors: list[F32]) -> F32:
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total


def _added(pre: Tensor, fts: list[Tensor], parts: list[Bools], merged: F32, scale: float) -> Tensor:
    """pre + scale · merged; pre's bits where that is no step, a model's where it is that model's whole step."""
    dtype = fts[0].dtype
    base = exact(pre) if pre.dtype == torch.float64 else exact(pre).astype(np.float32)
    step = np.float32(scale) * merged
    out = torch.from_numpy(base + step).to(dtype)
    alone = np.sum(parts, axis=0) == 1
    for ft, part in zip(fts, parts, strict=True):
        if scale == 1:
            out = torch.where(torch.from_numpy(part & alone), ft.to(dtype).flatten(), out)
    return torch.where(torch.from_numpy(step == 0), pre.to(dtype).flatten(), out).reshape(pre.shape)


def philox(key: int, block: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 64-bit words of a block.

    numpy counts a block up before it computes it.
    """
    word = (1 << 64) - 1
    k0, k1, (x0, x1, x2, x3) = key & word, key >> 64, (block + 1, 0, 0, 0)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (p1 >> 64) ^ x1 ^ k0, p1 & word, (p0 >> 64) ^ x3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return [x0, x1, x2, x3]


def noise_median(beta: float) -> float:
    """The median of the Marchenko–Pastur law, whose density is √((b − x)(x − a)) / (2πβx) on [a, b] = [(1 − √β)², (1 + √β)²]."""
    from scipy.integrate import quad
    from scipy.optimize import brentq

    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(x: float) -> float:
        density = lambda y: math.sqrt(max((b - y) * (y - a), 0)) / (2 * math.pi * beta * y) if y else 0.0  # noqa: E731
        return float(quad(density, a, x, limit=500)[0])

    return float(brentq(lambda x: below(x) - 0.5, a + 1e-9, b))


def dg_hard(pre: Tensor, ft: Tensor, scale: float) -> F64:
    """pre + Σ_{σ_i > τ} σ_i u_i v_iᵀ of Δ, τ = scale · ω(β) · median(σ) / √(the median of noise), of one matrix, by its SVD."""
    delta = (exact(ft) - exact(pre)).reshape(pre.shape)
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    beta = min(pre.shape) / max(pre.shape)
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    kept = s > scale * omega * np.median(s) / math.sqrt(noise_median(beta))
    out: F64 = exact(pre).reshape(pre.shape) + (u[:, kept] * s[kept]) @ v[kept]
    return out


def intruder_vectors(pre: Tensor, ft: Tensor, k: int, epsilon: float) -> tuple[Bools, F64, F64, F64]:
    """Which of ft's k leading left singular vectors have no |cosine| of epsilon with pre's; u, σ and v of all k."""
    u0, _, _ = np.linalg.svd(exact(pre).reshape(pre.shape), full_matrices=False)
    u, s, v = np.linalg.svd(exact(ft).reshape(ft.shape), full_matrices=False)
    k = min(k, len(s))
    found: Bools = abs(u0.T @ u[:, :k]).max(axis=0) < epsilon
    return found, u[:, :k], s[:k], v[:k]


def intruder(pre: Tensor, ft: Tensor, k: int, epsilon: float, factor: float) -> F64:
    """ft + Σ (factor − 1) · (uᵀ Δ v) · u vᵀ over the intruders."""
    found, u, _, v = intruder_vectors(pre, ft, k, epsilon)
    delta = (exact(ft) - exact(pre)).reshape(ft.shape)
    out = exact(ft).reshape(ft.shape).copy()
    for i in np.flatnonzero(found):
        out += (factor - 1) * (u[:, i] @ delta @ v[i]) * np.outer(u[:, i], v[i])
    return out
