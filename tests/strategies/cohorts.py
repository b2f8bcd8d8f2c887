"""Cohorts of plain updates for tests of rules, and what a rule makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.layout import Layout
from strategies.cohort import Cohort
from strategies.stage import Pre, Rule, State


def named(rows_ND: Tensor | Sequence[Sequence[float]], prefix: str = "site") -> dict[str, Tensor]:
    rows = torch.as_tensor(rows_ND, dtype=torch.float32)
    return {f"{prefix}-{index:03d}": row for index, row in enumerate(rows)}


def plain(
    rows: Tensor | Sequence[Sequence[float]] | Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
) -> Cohort:
    """A cohort of one tensor `w` per site."""
    deltas = rows if isinstance(rows, Mapping) else named(rows)
    size = len(next(iter(deltas.values())))
    return Cohort.of(Layout(("w",), ((size,),)), torch.zeros(size), deltas, weights)


def apply(rule: Rule, cohort: Cohort, state: State | None = None) -> tuple[Tensor, State]:
    before = rule.init(cohort.layout.size) if state is None else state
    delta, after = rule.apply(before, cohort, torch.Generator().manual_seed(0))
    return delta.vector_D, after


def result(rule: Rule, cohort: Cohort) -> Tensor:
    return apply(rule, cohort)[0]


def prepared(pre: Pre, cohort: Cohort, seed: int = 0) -> Cohort:
    state = pre.init(cohort.layout.size)
    return pre.apply(state, cohort, torch.Generator().manual_seed(seed))[0]
