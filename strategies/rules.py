"""Rules, Cohort -> Delta, and the stages that prepare a cohort for them, Cohort -> Cohort."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from strategies.cohort import Cohort, Delta, norm
from strategies.mixing import weighted_sum
from strategies.stage import Facts, Pre, Rule, Stage, chain, pure

ClipNorm: TypeAlias = Annotated[float, Field(gt=0)]

# Room for the roundings of the factor and of the product, half a unit in the last place each.
_ROUNDING = 1.0 - 2.0**-22
_ULP = 1.01 * 2.0**-24  # of float32; 1 % for the products of roundings


def mean() -> Rule:
    """Weighted mean of the deltas (McMahan et al. 2017, Algorithm 1): sum over sites of w * delta.

    Reads one row at a time, in the order of site names: O(N D) time, memory of two deltas.
    Breakdown point 0: one site can move it anywhere within the gate's bound. Without one site's
    delta, the weights of the others fixed, it moves by at most clip * max_weight.
    """
    return Stage("mean", Cohort, Delta, pure(_mean), proves=_mean_proves)


def _mean(cohort: Cohort) -> Delta:
    source = cohort.source
    total_D = weighted_sum(source.rows, cohort.coefficients_S.tolist(), source.layout.size)
    return Delta(total_D, cohort.layout)


def _mean_proves(facts: Facts) -> Facts:
    if facts.clip is None or facts.max_weight is None or facts.sites is None:
        return Facts()
    # A float32 sum of n products is off by n + 2 roundings of each term, with and without the site
    # (Casacuberta et al. 2022 show what forgetting this costs).
    rounding = 2.0 * facts.sites * (facts.sites + 2) * _ULP
    return Facts(sensitivity=facts.clip * facts.max_weight * (1.0 + rounding))


def norm_bounding(*, clip_norm: ClipNorm) -> Rule:
    """Weighted mean of the deltas, each scaled to an L2 norm of at most `clip_norm`.

    Sun et al. 2019, "Can you really backdoor federated learning?", section 4: norm thresholding.
    Breakdown point 0, but a site of weight w moves the mean by at most w * clip_norm. O(N D) time.
    """
    return replace(chain(clip(clip_norm=clip_norm), mean()), name="norm-bounding")


def clip(*, clip_norm: ClipNorm) -> Pre:
    """Scale every delta to an L2 norm of at most `clip_norm` (McMahan et al. 2018, section 2.2).

    Deltas within the bound keep their bits. O(N D) time, one delta of memory.
    """

    def apply(cohort: Cohort) -> Cohort:
        factors = [_factor(row, clip_norm) for row in cohort.rows]
        scaled = cohort.mixed(torch.diag(torch.tensor(factors, dtype=torch.float64)))
        return replace(scaled, clip=_tighter(cohort.clip, clip_norm))

    def proves(facts: Facts) -> Facts:
        return replace(facts, clip=_tighter(facts.clip, clip_norm))

    return Stage("clip", Cohort, Cohort, pure(apply), proves=proves)


def _factor(row_D: Tensor, bound: float) -> float:
    length = norm(row_D)
    return 1.0 if length <= bound else bound / length * _ROUNDING


def _tighter(known: float | None, bound: float) -> float | None:
    if math.isinf(bound):
        return known
    return bound if known is None else min(known, bound)
