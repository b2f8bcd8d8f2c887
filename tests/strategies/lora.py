"""Cohorts with LoRA factors, and a naive second implementation of their products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.layout import Layout
from strategies.cohort import Cohort

# Two pairs of different shapes and ranks, and a classification head without a pair.
LORA = Layout(
    (
        "x.q.lora_A.weight",
        "x.q.lora_B.weight",
        "head.weight",
        "x.k.lora_A.weight",
        "x.k.lora_B.weight",
    ),
    ((2, 5), (7, 2), (3, 4), (3, 6), (5, 3)),
)
PAIRS = (("x.q.lora_A.weight", "x.q.lora_B.weight"), ("x.k.lora_A.weight", "x.k.lora_B.weight"))


def lora_cohort(
    seed: int, count: int, *, gauge: Sequence[float] = (), lora_scale: float = 1.0
) -> Cohort:
    """Random factors; site i sends (k A, B / k) with k = gauge[i] for the same product."""
    generator = torch.Generator().manual_seed(seed)
    base_D = torch.randn(LORA.size, generator=generator)
    deltas = {}
    for index in range(count):
        new = LORA.unflatten(base_D + torch.randn(LORA.size, generator=generator))
        k = gauge[index] if index < len(gauge) else 1.0
        for a, b in PAIRS:
            new[a], new[b] = new[a] * k, new[b] / k
        deltas[f"site-{index:03d}"] = LORA.flatten(new) - base_D
    weights = torch.rand(count, generator=generator) + 0.1
    named = dict(zip(deltas, weights.tolist(), strict=True))
    cohort = Cohort.of(LORA, base_D, deltas, named)
    return Cohort(base_D, cohort.rows, cohort.weights_N, cohort.names, LORA, lora_scale=lora_scale)


def update(cohort: Cohort, row_D: Tensor) -> Tensor:
    """What a row adds, each module as a dense product times the scale, as one float64 vector."""
    base = LORA.unflatten(cohort.base_D)
    new = {name: base[name].double() + d for name, d in LORA.unflatten(row_D).items()}
    parts = [
        (new[b] @ new[a] - base[b].double() @ base[a].double()) * cohort.lora_scale
        for a, b in PAIRS
    ]
    head = new["head.weight"] - base["head.weight"].double()
    return torch.cat([part.flatten() for part in [*parts, head]])


def products(cohort: Cohort) -> Tensor:
    """The dense updates of all rows, (N, X)."""
    return torch.stack([update(cohort, row) for row in cohort.rows])
