"""Bulyan: whole updates are chosen first, then each coordinate by itself.

Shape suffixes: N sites, C coordinates of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from strategies.cohort import Cohort, Delta
from strategies.conditions import NumByzantine, tolerated
from strategies.coordinates import Array, mean_of, per_coordinate
from strategies.geometry import gram, squared_distances
from strategies.stage import Rule, Stage, pure


def bulyan(*, num_byzantine: NumByzantine = 1) -> Rule:
    """Bulyan of Krum (El Mhamdi et al. 2018, section 4): N-2f updates, then N-4f values of each.

    f is `num_byzantine`. Krum chooses N-2f updates one after the other, each among those that are
    left; of each coordinate's values the N-4f nearest their median are averaged. Krum's condition
    fails for the last two to be chosen; they keep f+1 neighbours, so that f liars who send the
    same do not vouch for each other. Sites count alike: their weights are ignored. While at most
    f of N >= 4f+3 sites lie, no coordinate is further from the median of those chosen than two
    honest values are from each other.
    O(N^2 D + N^3) time, memory of one delta and a block of rows. With LoRA factors updates are
    compared by their products, and what `trimmed-mean` refuses of them is refused, since
    coordinates are averaged after all. Raises CohortError for that and for fewer sites.
    """

    def lies(count: int, caught: int = 0) -> int:
        return tolerated(count, num_byzantine, 4, 3, caught)

    def requires(count: int) -> int:
        lies(count)
        return count

    def chosen(cohort: Cohort, f: int) -> Cohort:
        count = len(cohort.names) - 2 * f
        distances_NN = squared_distances(gram(cohort)).numpy()
        indices = sorted(_chosen(distances_NN, f, count))
        picks = torch.eye(len(cohort.names), dtype=torch.float64)[indices]
        names = [cohort.names[index] for index in indices]
        return cohort.mixed(picks, names, torch.full((count,), 1.0 / count))

    def apply(cohort: Cohort) -> Delta:
        f = lies(len(cohort.names), cohort.caught)
        kept = len(cohort.names) - 4 * f
        return per_coordinate(chosen(cohort, f), lambda x_NC: _nearest_median(x_NC, kept), "bulyan")

    return Stage("bulyan", Cohort, Delta, pure(apply), requires=requires)


def _chosen(distances_NN: NDArray[np.float64], f: int, count: int) -> list[int]:
    """Indices of the `count` updates that Krum chooses in turn; ties go to the first."""
    total = len(distances_NN)
    distances = distances_NN.copy()
    np.fill_diagonal(distances, np.inf)
    # Sorted once; those that are gone are masked.
    order = np.argsort(distances, axis=1, kind="stable")
    ascending = np.take_along_axis(distances, order, axis=1)
    left = np.isfinite(ascending)
    place = np.argsort(order, axis=1)  # where each other update stands in a row's order
    scores, chosen = np.empty(total), list[int]()
    while len(chosen) < count:
        neighbours = max(total - len(chosen) - f - 2, f + 1)
        near = left & (np.cumsum(left, axis=1) <= neighbours)
        scores = np.where(near, ascending, 0.0).sum(axis=1)
        scores[chosen] = np.inf
        chosen.append(int(scores.argmin()))
        left[np.arange(total), place[:, chosen[-1]]] = False
    return chosen


def _nearest_median(sorted_NC: Array, kept: int) -> Array:
    """Mean of the `kept` values nearest the median of each column; ties go to the lower ones."""
    count = len(sorted_NC)
    median_C = mean_of(sorted_NC[(count - 1) // 2 : count // 2 + 1])
    # The nearest ones stand side by side: the window whose further end is nearest.
    reach = np.maximum(median_C - sorted_NC[: count - kept + 1], sorted_NC[kept - 1 :] - median_C)
    first_C = reach.argmin(axis=0)
    place_N1 = np.arange(count)[:, None]
    inside_NC = (place_N1 >= first_C) & (place_N1 < first_C + kept)
    total_C = np.add.reduce(np.where(inside_NC, sorted_NC, 0.0), axis=0, dtype=np.float64)
    mean_C: Array = (total_C / kept).astype(np.float32)
    return mean_C
