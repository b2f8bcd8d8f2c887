"""Rules, Cohort -> Delta, and the stages that prepare a cohort for them, Cohort -> Cohort."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, TypeAlias

import torch
from pydantic import Field

from strategies.cohort import Cohort, Delta, norm
from strategies.combine import combined
from strategies.geometry import lengths
from strategies.mixing import weighted_sum
from strategies.product import structure
from strategies.stage import Facts, Pre, Rule, Stage, chain, pure

ClipNorm: TypeAlias = Annotated[float, Field(gt=0)]

# Room for the roundings of the factor and of the product, half a unit in the last place each.
_ROUNDING = 1.0 - 2.0**-22
_ULP = 1.01 * 2.0**-24  # of float32; 1 % for the products of roundings


def mean() -> Rule:
    """Weighted mean of the deltas (McMahan et al. 2017, Algorithm 1): sum over sites of w * delta.

    Reads one row at a time, in the order of site names: O(N D) time, memory of two deltas.
    Breakdown point 0: one site can move it anywhere within the gate's bound. Without one site's
    delta, the weights of the others fixed, it moves by at most clip * max_weight. LoRA factors: A
    and B apart, but after a stage that judges products, such as `nnm` or `multi-krum`, the mean of
    products cut to the payload's rank, as in `lora-svd`.
    """
    return Stage("mean", Cohort, Delta, pure(_mean), proves=_mean_proves)


def _mean(cohort: Cohort) -> Delta:
    # Nothing is proved after a stage that judges, so that no proof is lost here.
    return combined(cohort) if cohort.judged else summed(cohort)


def summed(cohort: Cohort) -> Delta:
    """The weighted mean of the deltas, coordinate by coordinate, whatever they are."""
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

    Deltas within the bound keep their bits. O(N D) time, one delta of memory. LoRA factors: where
    products are judged or added up, the norm of the product that a delta adds, times alpha / rank,
    is held to the bound as well, since factors of norm 1 can multiply to more. After a stage that
    judges products it alone is: factors (k A, B / k) that `nnm` has mixed into many updates would
    shorten all of them. By itself it has breakdown point 0, as the mean after it.
    """
    return _clip(clip_norm, False)


def clip_products(*, clip_norm: ClipNorm) -> Pre:
    """`clip` before stages and rules that take LoRA factors by their products."""
    return _clip(clip_norm, True)


def _clip(clip_norm: float, products: bool) -> Pre:
    def apply(cohort: Cohort) -> Cohort:
        paired = bool(structure(cohort.layout).pairs)
        alone = paired and cohort.judged
        norms = [lengths(cohort).tolist()] if paired and (products or alone) else []
        norms += [] if alone else [[norm(row) for row in cohort.rows]]
        factors = [_factor(max(both), clip_norm) for both in zip(*norms, strict=True)]
        scaled = cohort.mixed(torch.diag(torch.tensor(factors, dtype=torch.float64)))
        # Of the factors themselves nothing is proved where their products alone were bounded.
        return scaled if alone else replace(scaled, clip=_tighter(cohort.clip, clip_norm))

    def proves(facts: Facts) -> Facts:
        # Of what nothing is known of may have been judged, products alone are bounded.
        known = facts != Facts()
        return replace(facts, clip=_tighter(facts.clip, clip_norm)) if known else facts

    return Stage("clip", Cohort, Cohort, pure(apply), proves=proves)


def _factor(length: float, bound: float) -> float:
    return 1.0 if length <= bound else bound / length * _ROUNDING


def _tighter(known: float | None, bound: float) -> float | None:
    if math.isinf(bound):
        return known
    return bound if known is None else min(known, bound)
