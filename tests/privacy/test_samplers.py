"""Exact integer samplers: against textbook masses, with the power to tell a wrong scale."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy import samplers

COUNT = 20_000
Sampler = Callable[[int, float, samplers.Words], samplers.Integers]


def words(seed: int) -> samplers.Words:
    generator = np.random.PCG64(seed)
    return generator.random_raw


def masses(name: str, std: float, values: NDArray[np.int64]) -> NDArray[np.float64]:
    if name == "skellam":
        return np.asarray(stats.skellam.pmf(values, std**2 / 2, std**2 / 2))
    wide = np.arange(-int(12 * std + 12), int(12 * std + 13))
    total = np.exp(-((wide / std) ** 2) / 2).sum()
    return np.asarray(np.exp(-((values / std) ** 2) / 2) / total)


def chi_square(drawn: samplers.Integers, name: str, std: float) -> float:
    """p-value of the draws against masses computed elsewhere, in at most 41 bins."""
    edge = int(5 * std) + 1
    values = np.arange(-edge, edge + 1)
    expected = masses(name, std, values) * len(drawn)
    observed = np.array([np.count_nonzero(drawn == v) for v in values], dtype=float)
    bins = np.array_split(np.arange(len(values)), min(41, len(values)))
    e = np.array([expected[b].sum() for b in bins])
    o = np.array([observed[b].sum() for b in bins])
    enough = e >= 5
    e, o = e[enough], o[enough]
    e, o = np.append(e, len(drawn) - e.sum()), np.append(o, len(drawn) - o.sum())
    return float(stats.chi2.sf(((o - e) ** 2 / np.maximum(e, 1)).sum(), len(e) - 1))


SAMPLERS = [("gaussian", samplers.discrete_gaussian), ("skellam", samplers.skellam)]


@pytest.mark.parametrize("std", [0.6, 1.0, 4.7, 60.0])
@pytest.mark.parametrize(("name", "sampler"), SAMPLERS)
def test_the_right_scale_is_accepted_and_two_wrong_ones_are_not(
    name: str, sampler: Sampler, std: float
) -> None:
    assert chi_square(sampler(COUNT, std, words(1)), name, std) > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert chi_square(sampler(COUNT, std * wrong, words(1)), name, std) < 1e-9


def test_gaussian_and_skellam_of_one_scale_are_told_apart() -> None:
    assert chi_square(samplers.skellam(COUNT, 1.0, words(2)), "gaussian", 1.0) < 1e-9
    assert chi_square(samplers.discrete_gaussian(COUNT, 1.0, words(2)), "skellam", 1.0) < 1e-9


# Just beyond the largest table the coarse lattice is widest for the noise on it.
@pytest.mark.parametrize("std", [2049.0, 5e4, 3e10])
def test_wide_gaussians_are_sums_over_lattices_without_a_seam(std: float) -> None:
    drawn = samplers.discrete_gaussian(COUNT, std, words(3))
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-3
    assert stats.kstest(drawn / std * 1.5, "norm").pvalue < 1e-9
    for modulus in (2, 3, 400):
        counts = np.bincount(drawn % modulus, minlength=modulus)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_wide_skellam_is_a_sum_of_narrow_ones() -> None:
    drawn = samplers.skellam(COUNT, 5000.0, words(4))
    assert stats.kstest(drawn / 5000.0, "norm").pvalue > 1e-3
    assert stats.kstest(drawn / 5000.0 * 1.5, "norm").pvalue < 1e-9


@pytest.mark.parametrize("std", [0.3, 1.0, 7.5, 300.0])
@pytest.mark.parametrize(
    ("name", "make"),
    [("gaussian", samplers._gaussian_table), ("skellam", samplers._skellam_table)],
)
def test_tables_hold_the_distribution(
    name: str, make: Callable[[float], samplers._Table], std: float
) -> None:
    table = make(std)
    bounds = [0, *table.bounds, 1 << 256]
    exact = np.array([(b - a) / 2**256 for a, b in itertools.pairwise(bounds)])
    values = np.arange(len(exact)) + table.first
    near = np.abs(values) < 30 * std + 30
    assert np.allclose(exact[near], masses(name, std, values[near]), rtol=1e-9, atol=1e-60)
    assert (values[-1], exact[0]) == (-table.first, pytest.approx(exact[-1], abs=1e-70))
    assert list(table.bounds) == sorted(table.bounds)


def test_a_draw_that_64_bits_leave_open_asks_for_more() -> None:
    table = samplers._gaussian_table(3.0)
    index = -table.first
    bound = table.bounds[index]
    low = [bound >> shift & (2**64 - 1) for shift in (128, 64, 0)]
    at = [bound >> 192, *low]
    below = [bound >> 192, *low[:2], low[2] - 1]

    def scripted(script: list[int]) -> samplers.Words:
        left = iter(script)
        return lambda count: np.array([next(left) for _ in range(count)], dtype=np.uint64)

    assert low[2] > 0
    assert samplers.discrete_gaussian(1, 3.0, scripted(below)).tolist() == [0]
    assert samplers.discrete_gaussian(1, 3.0, scripted(at)).tolist() == [1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from([0.2, 1.0, 37.5]))
def test_a_draw_inverts_the_distribution_function(word: int, std: float) -> None:
    def fixed(count: int) -> NDArray[np.uint64]:
        return np.full(count, word, dtype=np.uint64)

    drawn = int(samplers.discrete_gaussian(1, std, fixed)[0])
    table = samplers._gaussian_table(std)
    exact = sum(word << shift for shift in (192, 128, 64, 0))
    assert drawn == table.first + sum(bound <= exact for bound in table.bounds)


def test_no_noise_is_zero_and_impossible_scales_are_refused() -> None:
    for sampler in (samplers.discrete_gaussian, samplers.skellam):
        assert not sampler(5, 0.0, words(0)).any()
        assert sampler(0, 1.0, words(0)).shape == (0,)
        for std in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="finite standard deviation of 0 or more"):
                sampler(1, std, words(0))
    with pytest.raises(ValueError, match="at most 65536, got 1e"):
        samplers.skellam(1, 1e6, words(0))
