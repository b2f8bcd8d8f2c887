"""Stages that mix the updates of several sites before a robust rule sees them, Cohort -> Cohort."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field

from strategies.cohort import Cohort
from strategies.conditions import NumByzantine, tolerated
from strategies.geometry import gram, squared_distances
from strategies.stage import Pre, Stage, State, pure


def nnm(*, num_byzantine: NumByzantine = 1) -> Pre:
    """Nearest-neighbour mixing (Allouah et al. 2023, Algorithm 2): mean of the N-f nearest.

    Each update becomes the mean of the N-f updates closest to it, itself among them, with f =
    `num_byzantine`; ties go to the site whose name comes first. Sites count alike from here on:
    their weights are dropped. Pulls honest updates that differ together, so that the rule after it
    resists with heterogeneous data; while at most f of N >= 2f+1 sites lie, an honest update moves
    by at most the largest distance between two honest ones. LoRA factors: distances and means are
    those of the products, so that no rule by coordinates may follow. O(N^2 D) time. Raises
    CohortError for fewer sites.
    """

    def near(count: int, caught: int = 0) -> int:
        return count - tolerated(count, num_byzantine, 2, 1, caught)

    def requires(count: int) -> int:
        near(count)
        return count

    def apply(cohort: Cohort) -> Cohort:
        count = len(cohort.names)
        kept = near(count, cohort.caught)
        distances_NN = squared_distances(gram(cohort)).fill_diagonal_(-1.0)
        nearest = distances_NN.sort(dim=1, stable=True).indices[:, :kept]
        mix_NN = torch.zeros(count, count, dtype=torch.float64)
        mix_NN.scatter_(1, nearest, 1.0 / kept)
        even = torch.full((count,), 1.0 / count)
        return cohort.mixed(mix_NN, weights_M=even, judged=True)

    return Stage("nnm", Cohort, Cohort, pure(apply), requires=requires)


def bucketing(*, bucket_size: Annotated[int, Field(ge=1)] = 2) -> Pre:
    """Bucketing (Karimireddy et al. 2022, Algorithm 1): means of random buckets of updates.

    The ceil(N / bucket_size) means go on as updates of the same weight, drawn anew each round from
    the run's seed. Of itself it has breakdown point 0: one liar spoils a bucket, so that the rule
    after it, whose breakdown point is a share of the buckets, bears as many liars as it bears
    buckets. O(N D) time.
    """

    def requires(count: int) -> int:
        return math.ceil(count / bucket_size)

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Cohort, State]:
        count = len(cohort.names)
        buckets = torch.randperm(count, generator=generator).split(bucket_size)
        mix_MN = torch.zeros(len(buckets), count, dtype=torch.float64)
        for row, members in zip(mix_MN, buckets, strict=True):
            row[members] = 1.0 / len(members)
        names = [f"bucket-{index:06d}" for index in range(len(buckets))]
        even = torch.full((len(buckets),), 1.0 / len(buckets))
        return cohort.mixed(mix_MN, names, even), state

    return Stage("bucketing", Cohort, Cohort, apply, requires=requires)
