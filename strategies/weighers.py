"""Rules that choose or weigh whole updates by their distances: Krum, geometric median, clipping.

Shape suffixes: N sites, D parameters. With LoRA factors, updates are compared by the products that
they add. Each is a stage Cohort -> Cohort which `closing` makes into a rule, so that a chain of
them reads the updates once to compare and once to add. Ties go to the site whose name comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Annotated, ParamSpec, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from strategies.cohort import Cohort, CohortError
from strategies.combine import combine
from strategies.conditions import NumByzantine, tolerated
from strategies.geometry import gram, squared_distances
from strategies.stage import Pre, Rule, Stage, chain, pure

P = ParamSpec("P")
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


def closing(factory: Callable[P, Pre]) -> Callable[P, Rule]:
    """The rule of the same name and options that ends a stage of `factory` with `combine`."""

    @wraps(factory)
    def rule(*args: P.args, **kwargs: P.kwargs) -> Rule:
        weigher = factory(*args, **kwargs)
        return replace(chain(weigher, combine()), name=weigher.name)

    return rule


def krum(*, num_byzantine: NumByzantine = 1) -> Pre:
    """The one update closest to its N-f-2 nearest others (Blanchard et al. 2017, section 4).

    `num_byzantine` is f. The neighbours are those of the paper; some libraries count N-f-1, which
    is this rule for f-1. Sites count alike: their weights are ignored. While at most f of
    N >= 2f+3 sites lie, the chosen update is within sqrt(N-f-2) times the largest distance between
    two honest updates of one of them. O(N^2 D) time. Raises CohortError for fewer sites.
    """

    def lies(count: int, caught: int = 0) -> int:
        return tolerated(count, num_byzantine, 2, 3, caught)

    def requires(count: int) -> int:
        lies(count)
        return 1

    def apply(cohort: Cohort) -> Cohort:
        f = lies(len(cohort.names), cohort.caught)
        return _selected(cohort, _closest(cohort, f, 1))

    return Stage("krum", Cohort, Cohort, pure(apply), requires=requires)


def multi_krum(
    *, num_byzantine: NumByzantine = 1, num_selected: Annotated[int, Field(ge=0)] = 0
) -> Pre:
    """Mean of the `num_selected` updates that Krum ranks best (Blanchard et al. 2017, section 4).

    `num_byzantine` is f; 0 selects N-f, and no more may be. Sites count alike: their weights are
    ignored. While at most f of N >= 2f+3 sites lie, each selected update is within sqrt(N-f-2)
    times the largest distance between two honest updates of one of them; the paper's own guarantee
    asks for fewer than N-2f-2. O(N^2 D) time. Raises CohortError for fewer sites.
    """

    def lies(count: int, caught: int = 0) -> int:
        return tolerated(count, num_byzantine, 2, 3, caught)

    def requires(count: int, caught: int = 0) -> int:
        most = count - lies(count, caught)
        # Sites that the gate has set aside are fewer to choose from, as in `tolerated`.
        if num_selected - caught > most:
            raise CohortError(
                f"Expected strategy.num-selected={num_selected} to be at most {most + caught} "
                f"(n={count} updates, of which strategy.num-byzantine={num_byzantine} may lie); "
                "lower it or add sites."
            )
        return min(num_selected or most, most)

    def apply(cohort: Cohort) -> Cohort:
        sites = len(cohort.names)
        kept, f = requires(sites, cohort.caught), lies(sites, cohort.caught)
        return _selected(cohort, _closest(cohort, f, kept))

    return Stage("multi-krum", Cohort, Cohort, pure(apply), requires=requires)


def krum_scores(distances_NN: Tensor, num_byzantine: int) -> Tensor:
    """Sum of each row's N-f-2 smallest squared distances to other rows, (N,)."""
    others = distances_NN.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : len(others) - num_byzantine - 2].sum(1)


def _closest(cohort: Cohort, f: int, count: int) -> list[int]:
    scores_N = krum_scores(squared_distances(gram(cohort)), f)
    return sorted(scores_N.sort(stable=True).indices[:count].tolist())


def _selected(cohort: Cohort, indices: list[int]) -> Cohort:
    count = len(indices)
    picks = torch.eye(len(cohort.names), dtype=torch.float64)[indices]
    names = [cohort.names[index] for index in indices]
    return cohort.mixed(picks, names, torch.full((count,), 1.0 / count), judged=True)


def geometric_median(*, iterations: Count = 100, smoothing: Positive = 1e-6) -> Pre:
    """Geometric median of the updates, RFA (Pillutla et al. 2022, Algorithm 2: smoothed Weiszfeld).

    Sites count alike, where the paper weighs them: a liar would say that it has the most rows.
    `smoothing` is the nu of the paper, below which a distance counts as nu; the start is the mean,
    the iterations cost O(N^2) each. Breakdown point 1/2: with a share s < 1/2 of liars it stays
    within 2 (1-s) / (1-2s) times the honest updates' distance from any point. O(N^2 D) time.
    """

    def apply(cohort: Cohort) -> Cohort:
        distances_NN = squared_distances(gram(cohort))
        sites = len(cohort.names)
        shares_N = torch.full((sites,), 1.0 / sites, dtype=torch.float64)
        for _ in range(iterations):
            to_all_N = distances_NN @ shares_N
            squares_N = to_all_N - 0.5 * torch.dot(shares_N, to_all_N)
            beta_N = 1.0 / squares_N.clamp(min=0.0).sqrt().clamp(min=smoothing)
            shares_N = beta_N / beta_N.sum()
        return reweighted(cohort, shares_N)

    return Stage("geometric-median", Cohort, Cohort, pure(apply))


def reweighted(cohort: Cohort, weights_N: Tensor) -> Cohort:
    """The same updates with other weights, which sum to 1 and come from judging them."""
    same = torch.eye(len(cohort.names), dtype=torch.float64)
    return cohort.mixed(same, weights_M=weights_N, judged=True)
