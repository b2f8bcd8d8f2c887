"""Inputs on which robust rules are tried: random, heavy-tailed, tied, degenerate, attacked."""

from __future__ import annotations

from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS: tuple[Literal["normal", "cauchy", "tied", "degenerate"], ...] = (
    "normal", "cauchy", "tied", "degenerate",
)  # fmt: skip
SEEDS = st.integers(0, 2**31)


def rows_of(kind: str, seed: int, count: int, size: int = 6) -> Tensor:
    """Updates (N, D) of a kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(count, size, generator=generator)
    if kind == "cauchy":
        return torch.empty(count, size).cauchy_(generator=generator)
    if kind == "tied":
        return torch.randint(-1, 2, (count, size), generator=generator).float()
    return torch.ones(count, size)


# Where an adversary who sees everything may put his updates, relative to the honest ones.
LIES = st.sampled_from([1e-3, 1.0, -1.0, 30.0, -1e4, 1e15])


def attacked(honest_ND: Tensor, lies: list[float], seed: int) -> Tensor:
    """The honest updates and one lie each: far along the mean, or along a random direction."""
    generator = torch.Generator().manual_seed(seed)
    told = [
        honest_ND.mean(0) * lie
        if index % 2
        else torch.randn(honest_ND.shape[1], generator=generator) * lie
        for index, lie in enumerate(lies)
    ]
    return torch.cat([honest_ND, torch.stack(told)])


def spread(rows_ND: Tensor) -> float:
    """Largest distance between two of the updates."""
    return float(torch.cdist(rows_ND.double(), rows_ND.double()).max())
