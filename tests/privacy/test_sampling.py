"""Poisson sampling: every record by a coin of its own."""

from __future__ import annotations

import math

import pytest

from privacy.noise import secure, seeded
from privacy.sampling import one_each, poisson, sample_rate


def test_rates() -> None:
    assert sample_rate(8, 100) == 0.08
    assert sample_rate(8, 5) == 1.0


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_sizes_are_binomial_and_every_record_is_as_likely(rate: float) -> None:
    source, rows, draws = seeded(5), 200, 400
    drawn = [poisson(rows, rate, source) for _ in range(draws)]
    sizes = [len(one) for one in drawn]
    mean = sum(sizes) / draws
    variance = sum((size - mean) ** 2 for size in sizes) / (draws - 1)
    expected = rows * rate * (1 - rate)
    assert abs(mean - rows * rate) < 4.5 * math.sqrt(expected / draws)
    assert abs(variance / expected - 1) < 4.5 * math.sqrt(2 / draws)  # fixed sizes have none
    counts = [sum(row in set(one) for one in drawn) for row in range(rows)]
    chi2 = sum((count - draws * rate) ** 2 for count in counts) / (draws * rate * (1 - rate))
    assert abs(chi2 - rows) < 4.5 * math.sqrt(2 * rows)


def test_pairs_are_drawn_independently() -> None:
    source, draws, rate = seeded(6), 3000, 0.4
    both = sum(poisson(2, rate, source) == [0, 1] for _ in range(draws))
    assert abs(both / draws - rate**2) < 4.5 * math.sqrt(rate**2 * (1 - rate**2) / draws)


def test_the_ends() -> None:
    assert poisson(5, 1.0, seeded(1)) == [0, 1, 2, 3, 4]
    assert poisson(5, 0.0, seeded(1)) == []
    assert poisson(50, 0.5, seeded(1)) == poisson(50, 0.5, seeded(1))
    assert poisson(64, 0.5, secure()) != poisson(64, 0.5, secure())


def test_one_of_each_group_with_equal_chances() -> None:
    groups, source = [[4], [7, 8, 9]], seeded(8)
    drawn = [one_each(groups, source) for _ in range(600)]
    assert {first for first, _ in drawn} == {4}
    counts = [sum(second == member for _, second in drawn) for member in groups[1]]
    assert all(abs(count - 200) < 4.5 * math.sqrt(600 * 2 / 9) for count in counts)
    assert one_each([], source) == []
