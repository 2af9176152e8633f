"""MoFO as METHODS.md and the paper's Algorithm 1 write it, entry by entry in float64, without a line of `surgery`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def filtered(scores: Sequence[float], alpha: str) -> list[bool]:
    """FLT_α: True for the ⌈α·n⌉ largest |scores|, ties to the lowest index; α is a decimal number, NaN the smallest."""
    n = len(scores)
    size = [-math.inf if math.isnan(score) else abs(score) for score in scores]
    order = sorted(range(n), key=lambda i: (-size[i], i))
    first = set(order[: math.ceil(Fraction(alpha) * n)])
    return [i in first for i in range(n)]


class Mofo:
    """One tensor's state and its steps; θ, m and v are float64, flat."""

    def __init__(self, theta: F64, alpha: str, lr: float, beta1: float, beta2: float, eps: float, decay: float) -> None:
        self.theta, self.alpha, self.lr = theta.copy(), alpha, lr
        self.beta1, self.beta2, self.eps, self.decay = beta1, beta2, eps, decay
        self.m, self.v, self.t = np.zeros_like(theta), np.zeros_like(theta), 0

    def step(self, gradient: F64, score: str = "momentum") -> list[bool]:
        """Do a step; which entries were updated."""
        self.t += 1
        n = len(self.theta)
        for i in range(n):
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * gradient[i]
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * gradient[i] * gradient[i]
        ratio = [0.0 if m == 0 else float(m / math.sqrt(v)) for m, v in zip(self.m, self.v, strict=True)]
        scores = {"momentum": self.m.tolist(), "gradient": gradient.tolist(), "mv": ratio}[score]
        chosen = filtered(scores, self.alpha)
        for i in range(n):
            if chosen[i]:
                m_hat = self.m[i] / (1 - self.beta1**self.t)
                v_hat = self.v[i] / (1 - self.beta2**self.t)
                self.theta[i] -= self.lr * self.decay * self.theta[i]
                self.theta[i] -= self.lr * m_hat / (math.sqrt(v_hat) + self.eps)
        return chosen
