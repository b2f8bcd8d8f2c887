"""Server optimisers: what the server does with the aggregated delta, Delta -> Delta.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2: the delta stands for a
pseudo-gradient, `m` and `v` for its first and second moment, without bias correction.
Products and sums are kept apart (no lerp, no addcmul), so that bits do not vary with threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from strategies.cohort import Delta
from strategies.stage import Post, Stage, State, pure

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def none() -> Post:
    """Add the aggregated delta as it is (FedAvg)."""
    return Stage("none", Delta, Delta, pure(lambda delta: delta), proves=lambda facts: facts)


def momentum(*, learning_rate: Positive = 1.0, momentum: Decay = 0.9) -> Post:
    """Server momentum (Hsu et al. 2019, FedAvgM): m = momentum * m + delta, step = rate * m."""

    def init(size: int) -> State:
        return {"m": torch.zeros(size)}

    def apply(state: State, delta: Delta, generator: torch.Generator) -> tuple[Delta, State]:
        m = state["m"] * momentum + delta.vector_D
        return replace(delta, vector_D=m * learning_rate), {"m": m}

    return Stage("momentum", Delta, Delta, apply, init)


def adam(
    *,
    learning_rate: Positive = 1.0,
    momentum: Decay = 0.9,
    beta2: Decay = 0.99,
    tau: Positive = 1e-3,
) -> Post:
    """FedAdam: v = beta2 * v + (1 - beta2) * delta^2; `momentum` is the paper's beta1."""

    def second(v: Tensor, square: Tensor) -> Tensor:
        return v * beta2 + square * (1.0 - beta2)

    return _adaptive("adam", second, learning_rate, momentum, tau)


def yogi(
    *,
    learning_rate: Positive = 1.0,
    momentum: Decay = 0.9,
    beta2: Decay = 0.99,
    tau: Positive = 1e-3,
) -> Post:
    """FedYogi: v = v - (1 - beta2) * delta^2 * sign(v - delta^2); `momentum` is beta1."""

    def second(v: Tensor, square: Tensor) -> Tensor:
        return v - square * (1.0 - beta2) * torch.sign(v - square)

    return _adaptive("yogi", second, learning_rate, momentum, tau)


def adagrad(*, learning_rate: Positive = 1.0, tau: Positive = 1e-3) -> Post:
    """FedAdagrad: v = v + delta^2, with beta1 = 0 as in the paper's experiments."""
    return _adaptive("adagrad", lambda v, square: v + square, learning_rate, 0.0, tau)


def _adaptive(
    name: str,
    second: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float,
    beta1: float,
    tau: float,
) -> Post:
    def init(size: int) -> State:
        # Algorithm 2 asks for v >= tau^2 at the start.
        return {"m": torch.zeros(size), "v": torch.full((size,), tau**2)}

    def apply(state: State, delta: Delta, generator: torch.Generator) -> tuple[Delta, State]:
        m = state["m"] * beta1 + delta.vector_D * (1.0 - beta1)
        v = second(state["v"], delta.vector_D.square())
        step = m * learning_rate / (v.sqrt() + tau)
        return replace(delta, vector_D=step), {"m": m, "v": v}

    return Stage(name, Delta, Delta, apply, init)
