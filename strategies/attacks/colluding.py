"""Attacks by malicious sites that know all honest updates and act as one.

Shape suffixes: N honest sites, M malicious sites, D parameters. Options: see `AttackConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from strategies.attacks.config import AttackConfig
from strategies.attacks.view import View

# "Sufficiently large" for a start of the search; it is doubled where it is not.
_GAMMA = 10.0
_TOLERANCE = 1e-5


def sybil(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Copies of one poisoned update (Fung et al. 2020, section 3): the mean of the own ones."""
    return view.same(view.own_MD.double().mean(0))


def alie(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """A little is enough (Baruch et al. 2019, section 3): mean - z * standard deviation.

    z is the scale or, without one, the largest that s = floor((N + M) / 2 + 1) - M honest sites
    exceed: the normal quantile of (N - s) / N.
    """
    deviation_D, mean_D = _moments(view.honest_ND)
    return view.same(mean_D - deviation_D * (options.scale or _z_max(view)))


def _z_max(view: View) -> float:
    honest = len(view.honest_ND)
    supporters = view.sites // 2 + 1 - view.malicious
    share = (honest - supporters) / honest
    # Half of the sites or more would need no disguise, and a single honest one has no quantile.
    return max(0.0, NormalDist().inv_cdf(min(max(share, 0.5), 1 - 1e-9)))


def ipm(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Inner product manipulation (Xie et al. 2020, section 4): -scale * honest mean."""
    return view.same(view.honest_ND.double().mean(0) * -options.scale)


def mimic(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """All copy one honest site (Karimireddy et al. 2022, section 4), to drown out others.

    The site is the one that stands out most along the direction in which honest updates differ
    most. The paper estimates that direction over the first rounds; this takes the round's own.
    """
    centred_ND = view.honest_ND.double()
    centred_ND = centred_ND - centred_ND.mean(0)
    # The leading eigenvector of the Gram matrix holds the projections, up to one factor.
    _, vectors_NN = torch.linalg.eigh(centred_ND @ centred_ND.T)
    return view.same(view.honest_ND[int(vectors_NN[:, -1].abs().argmax())])


def min_max(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Farthest push whose distance to each honest update is at most the largest between any two.

    Shejwalkar & Houmansadr 2021, section IV (Min-Max), with gamma from their Algorithm 1.
    """

    def within(squares_N: Tensor, between_NN: Tensor) -> bool:
        return bool(squares_N.max() <= between_NN.max())

    return _pushed(view, options, within)


def min_sum(view: View, options: AttackConfig, generator: torch.Generator) -> Tensor:
    """Farthest push whose squared distances sum to at most the largest such sum of an honest one.

    Shejwalkar & Houmansadr 2021, section IV (Min-Sum), with gamma from their Algorithm 1.
    """

    def within(squares_N: Tensor, between_NN: Tensor) -> bool:
        return bool(squares_N.sum() <= between_NN.sum(1).max())

    return _pushed(view, options, within)


def _pushed(view: View, options: AttackConfig, within: Callable[[Tensor, Tensor], bool]) -> Tensor:
    """mean + gamma * direction, with the largest gamma for which `within` holds."""
    rows_ND = view.honest_ND.double()
    deviation_D, mean_D = _moments(rows_ND)
    push_D = -{"std": deviation_D, "unit": _unit(mean_D), "sign": mean_D.sign()}[options.direction]
    centred_ND = rows_ND - mean_D
    # |mean + g p - x|^2 is a parabola in g, so that each step of the search costs O(N).
    flat_N, slope_N = centred_ND.square().sum(1), -2 * (centred_ND @ push_D)
    curve = push_D.square().sum()
    between_NN = torch.cdist(centred_ND, centred_ND).square()
    if float(curve) == 0.0:
        return view.same(mean_D)
    gamma = largest(lambda g: within(flat_N + g * slope_N + g * g * curve, between_NN))
    return view.same(mean_D + gamma * push_D)


def largest(holds: Callable[[float], bool]) -> float:
    """Largest gamma >= 0 for which `holds`, to within 1e-5 of its size; 0 where it never does.

    Shejwalkar & Houmansadr 2021, Algorithm 1: halve the step, forward while it holds, else back.
    """
    start = _GAMMA
    while holds(start):
        start *= 2
    gamma, step, found = start, start / 2, 0.0
    while step > _TOLERANCE * max(found, _TOLERANCE):
        if holds(gamma):
            found = gamma
            gamma += step
        else:
            gamma -= step
        step /= 2
    return found


def _moments(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each value, in float64."""
    deviation_D, mean_D = torch.std_mean(rows_ND.double(), 0, correction=0)
    return deviation_D, mean_D


def _unit(vector_D: Tensor) -> Tensor:
    length = vector_D.norm()
    return vector_D / length if float(length) else vector_D
