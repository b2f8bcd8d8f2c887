"""Screening by module: an attack on one layer hides in the norm of the whole update.

Shape suffixes: N sites, M modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from models.layout import Layout
from strategies.cohort import Cohort, norm
from strategies.conditions import NumByzantine, tolerated
from strategies.product import Pair, structure
from strategies.stage import Pre, Stage, pure

# Makes the median of absolute deviations an estimate of a normal distribution's deviation.
_NORMAL = 1.4826
# Norms within 10 % of the median are no outliers, however alike the others are.
_SPREAD = 0.1


def module_screen(
    *,
    num_byzantine: NumByzantine = 1,
    screen_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0,
) -> Pre:
    """Leave out sites whose update of some module is far larger than that of the other sites.

    For each tensor, and for each pair of LoRA factors in product space, the norms of all sites are
    compared by the modified z-score of Iglewicz and Hoaglin 1993, (x - median) / (1.4826 MAD); the
    MAD counts as at least a tenth of the median. Only large norms count: a small update moves
    little. It comes first in `strategy.pre`, while each row is one site's. The f = `num_byzantine`
    worst sites beyond `screen_threshold` in any module are left out, which the report says with the
    module; weights of the others are scaled to sum to 1. Not from a paper; breakdown point f / N
    against updates of any size, for N >= 2f+1, but none against those of an honest size. O(N D)
    time, for LoRA O(N R^2 (I + O)) a module, one row in memory. Raises CohortError for fewer sites.
    """

    def most_out(count: int, caught: int = 0) -> int:
        return tolerated(count, num_byzantine, 2, 1, caught)

    def requires(count: int) -> int:
        # Fewer are left where sites are left out, which the stages after it must bear.
        return count - most_out(count)

    def apply(cohort: Cohort) -> Cohort:
        most = most_out(len(cohort.names), cohort.caught)
        modules, norms_NM = _norms(cohort)
        worst_N, where_N = _scores(norms_NM).max(dim=1)
        ranked = worst_N.sort(descending=True, stable=True).indices[:most].tolist()
        out = {
            index: f"module-screen: its update of {modules[int(where_N[index])]} is "
            f"{float(worst_N[index]):.1f} deviations larger than the median."
            for index in ranked
            if worst_N[index] > screen_threshold
        }
        return _without(cohort, out) if out else replace(cohort, judged=True)

    return Stage("module-screen", Cohort, Cohort, pure(apply), requires=requires)


def _without(cohort: Cohort, out: Mapping[int, str]) -> Cohort:
    kept = [index for index in range(len(cohort.names)) if index not in out]
    picks = torch.eye(len(cohort.names), dtype=torch.float64)[kept]
    weights = cohort.weights_N[kept].double()
    names = [cohort.names[index] for index in kept]
    left_out = {cohort.names[index]: reason for index, reason in out.items()}
    rest = cohort.mixed(picks, names, weights / weights.sum(), judged=True)
    return replace(rest, left_out={**cohort.left_out, **left_out})


def _scores(norms_NM: Tensor) -> Tensor:
    """How many robust deviations each norm is above the median of its column, (N, M), float64."""
    median_M = norms_NM.quantile(0.5, dim=0)
    mad_M = (norms_NM - median_M).abs().quantile(0.5, dim=0)
    deviation_M = _NORMAL * torch.maximum(mad_M, _SPREAD * median_M)
    above_NM = norms_NM - median_M
    # Where most send nothing and deviate by nothing, whoever sends something stands out.
    return torch.where(above_NM > 0, above_NM / deviation_M, torch.zeros_like(above_NM))


def _norms(cohort: Cohort) -> tuple[list[str], Tensor]:
    """Names of the modules, and the norm of each site's update of each, (N, M), float64."""
    found = structure(cohort.layout)
    names = _tensors(cohort.layout)
    modules = [pair.module for pair in found.pairs] + [names[part.start] for part in found.others]
    norms = [
        [
            *(_product_norm(pair, cohort.base_D, row_D) for pair in found.pairs),
            *(norm(row_D[part]) for part in found.others),
        ]
        for row_D in cohort.rows
    ]
    return modules, torch.tensor(norms, dtype=torch.float64)


def _tensors(layout: Layout) -> dict[int, str]:
    """Name of the tensor that starts at a place of (D,); empty ones give way to what follows."""
    starts, at = {}, 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        starts[at] = name
        at += prod(shape)
    return starts


def _product_norm(pair: Pair, base_D: Tensor, row_D: Tensor) -> float:
    """Norm of what a row adds to B A, from Gram matrices of its factors (2R, 2R)."""
    base_a, base_b = (factor.double() for factor in pair.factors(base_D))
    delta_a, delta_b = (factor.double() for factor in pair.factors(row_D))
    # (B + dB)(A + dA) - B A = dB (A + dA) + B dA.
    left = torch.cat([delta_b, base_b], dim=1)
    right = torch.cat([base_a + delta_a, delta_a], dim=0)
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0.0).sqrt())
