"""Which records take part in a step: each by a coin of its own, which nobody else may see fall."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from privacy.noise import Source


def sample_rate(expected: int, rows: int) -> float:
    """The chance of each of `rows` records that gives batches of `expected` on average."""
    return min(1.0, expected / rows)


def poisson(rows: int, rate: float, source: Source) -> list[int]:
    """Indices of the records drawn, each with the chance `rate` by itself; possibly none.

    Amplification by sampling holds only against those who do not know who was drawn, so that the
    draw comes from the source of the noise, not from a seed that the server knows.
    """
    if rate >= 1.0:
        return list(range(rows))
    drawn = source.words(rows) < np.uint64(int(rate * 2.0**64))
    return [int(index) for index in np.flatnonzero(drawn)]


def one_each(groups: Sequence[Sequence[int]], source: Source) -> list[int]:
    """One member of each group, all as likely: of a record in several chunks, one stands for it."""
    words = source.words(len(groups))
    return [group[int(word) % len(group)] for group, word in zip(groups, words, strict=True)]
