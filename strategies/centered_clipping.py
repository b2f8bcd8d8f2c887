"""Centred clipping: a mean of updates that are clipped around the last aggregate."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.cohort import Cohort, Delta
from strategies.combine import combined
from strategies.geometry import extended, gram
from strategies.product import structure
from strategies.stage import Rule, Stage, State
from strategies.weighers import Count, Positive


def centered_clipping(*, clip_radius: Positive = 1.0, clip_iterations: Count = 3) -> Rule:
    """Centred clipping (Karimireddy et al. 2021, Algorithm 2): v + mean of clip(x_i - v, radius).

    v starts at the aggregate of the round before (0 in the first), which is the state: D numbers,
    and the base of that round where the payload has LoRA factors. Sites count alike: their weights
    are ignored. Each of f liars moves the result by at most 2 * radius / N an iteration; breakdown
    point 1/2 for a radius of the order of the honest spread. O(N^2 D) time.
    """

    def init(size: int) -> State:
        return {"centre": torch.zeros(size)}

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Delta, State]:
        centre, signs = _centre(state, cohort)
        sites = len(cohort.names)
        joined = extended(cohort, centre) if centre else cohort
        # Everything is a combination of the sites' rows and of those that make up the centre.
        v = torch.cat([torch.zeros(sites), torch.tensor(signs)]).double()
        shares_NV = _clipped(gram(joined), v, sites, clip_radius, clip_iterations)
        even = torch.full((sites,), 1.0 / sites)
        delta = combined(joined.mixed(shares_NV, cohort.names, even))
        after = {"centre": delta.vector_D}
        return delta, after | ({"base": cohort.base_D} if _has_pairs(cohort) else {})

    return Stage("centered-clipping", Cohort, Delta, apply, init)


def _clipped(products_VV: Tensor, v: Tensor, sites: int, radius: float, iterations: int) -> Tensor:
    """Coefficients (N, V) of v + clip(x_i - v) in the last iteration, over the rows V of Gram."""
    own_NV = torch.eye(len(products_VV), dtype=torch.float64)[:sites]
    for _ in range(iterations):
        apart_NV = own_NV - v
        lengths_N = ((apart_NV @ products_VV) * apart_NV).sum(1).clamp(min=0.0).sqrt()
        factors_N = (radius / lengths_N).clamp(max=1.0)  # a length of 0 gives inf, and then 1
        clipped_NV = v + factors_N[:, None] * apart_NV
        v = clipped_NV.mean(0)
    return clipped_NV


def _centre(state: State, cohort: Cohort) -> tuple[list[Tensor], list[float]]:
    """Rows that add up to the last aggregate, and their signs; none in the first round.

    With LoRA factors the last aggregate is what its round added to the products: the product after
    that round less the product before it, each relative to the base of this round.
    """
    centre_D = state["centre"]
    if not bool(centre_D.any()):
        return [], []
    if "base" not in state:
        return [centre_D], [1.0]
    before_D = state["base"]
    return [before_D + centre_D - cohort.base_D, before_D - cohort.base_D], [1.0, -1.0]


def _has_pairs(cohort: Cohort) -> bool:
    return bool(structure(cohort.layout).pairs)
