"""Rules that weigh sites by what is known of them: a trusted update, or the rounds before.

Shape suffixes: N sites of this round, K sites of all rounds, D parameters.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from models.section import ConfigError
from strategies.cohort import Cohort
from strategies.geometry import extended, gram
from strategies.stage import Pre, Stage, State, pure
from strategies.weighers import reweighted

# Confidence of the logit (the paper's kappa), and how near 1 the best site's weight may come.
_KAPPA, _NEAR_ONE = 1.0, 0.99


def fltrust() -> Pre:
    """FLTrust (Cao et al. 2021, equations 2-4): weigh sites by their cosine with a trusted update.

    The server's own update on root data is the measure: a site's score is the positive part of the
    cosine with it, and its update is scaled to the same norm. Sites that all point the other way
    leave the model as it is. Sites' weights are ignored. No number of liars moves the result
    beyond the norm of the trusted update. O(N^2 D) time. Raises ConfigError without such an update.
    """

    def apply(cohort: Cohort) -> Cohort:
        if cohort.trusted_D is None:
            raise ConfigError(
                "Expected an update of the server's own with 'fltrust', got none; set "
                "strategy.root-source, or pass trusted= to strategies.aggregate."
            )
        products = gram(extended(cohort, [cohort.trusted_D]))
        lengths = products.diagonal().sqrt()
        own, root = lengths[:-1], lengths[-1]
        scores = torch.where(own * root > 0, products[:-1, -1] / (own * root), 0.0).clamp(min=0.0)
        scales = torch.where(own > 0, root / own, 0.0)
        return _scored(cohort, scores, scales)

    return Stage("fltrust", Cohort, Cohort, pure(apply))


def foolsgold() -> Pre:
    """FoolsGold (Fung et al. 2020, Algorithm 1): sites that resemble each other count less.

    Similarity is the cosine of the sites' histories. Kept as state are the names of all sites
    seen and the inner products of their updates, added up over rounds (K^2 numbers, not K D): the
    cosine of histories laid end to end, where the paper adds the updates themselves up. The
    weights are scaled to sum to 1. Made against copies of one attack; a lone liar has no bound
    (breakdown point 0), and honest sites with the same data are taken for copies. Sites' weights
    are ignored. O(N^2 D) time.
    """

    def init(size: int) -> State:
        return _remembered([], torch.zeros(0, 0, dtype=torch.float64))

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Cohort, State]:
        names, before = _names(state), state["products"]
        known = sorted({*names, *cohort.names})
        total = torch.zeros(len(known), len(known), dtype=torch.float64)
        for some, products in ((names, before), (cohort.names, gram(cohort))):
            at = torch.tensor([known.index(name) for name in some], dtype=torch.long)
            total[at[:, None], at] += products
        # `at` is now where the sites of this round stand.
        scores = foolsgold_scores(total[at][:, at])
        return _scored(cohort, scores, torch.ones(len(at))), _remembered(known, total)

    return Stage("foolsgold", Cohort, Cohort, apply, init)


def foolsgold_scores(products_NN: Tensor) -> Tensor:
    """Weights in [0, 1] of sites whose histories have these inner products, (N,)."""
    lengths = products_NN.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    cosines = torch.where(scale > 0, products_NN / scale, 0.0)
    if len(cosines) == 1:
        return torch.ones(1, dtype=torch.float64)
    cosines = cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool), -torch.inf)
    nearest = cosines.max(1).values
    # Pardoning: honest sites that resemble a site which resembles another one more.
    ratio = nearest.clamp(min=0.0)[:, None] / nearest
    pardon = torch.where((nearest > nearest[:, None]) & (nearest > 0), ratio, 1.0)
    weights = (1.0 - (cosines * pardon).max(1).values).clamp(0.0, 1.0)
    if float(weights.max()) <= 0.0:
        return torch.zeros_like(weights)
    weights = (weights / weights.max()).clamp(max=_NEAR_ONE)
    return (_KAPPA * (torch.logit(weights) + 0.5)).clamp(0.0, 1.0)


def _scored(cohort: Cohort, scores: Tensor, scales: Tensor) -> Cohort:
    """Updates times `scales`, weighed by `scores`; no update at all where all scores are 0."""
    total = float(scores.sum())
    if total <= 0.0:
        count = len(cohort.names)
        even = torch.full((count,), 1.0 / count)
        return cohort.mixed(torch.zeros(count, count), weights_M=even, judged=True)
    return reweighted(cohort.mixed(torch.diag(scales)), scores / total)


def _remembered(names: list[str], products: Tensor) -> State:
    text = json.dumps(names).encode()
    return {"names": torch.tensor(list(text), dtype=torch.uint8), "products": products}


def _names(state: State) -> list[str]:
    return [str(name) for name in json.loads(bytes(state["names"].tolist()))]
