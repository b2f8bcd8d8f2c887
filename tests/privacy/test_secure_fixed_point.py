"""Fixed-point sums: no wrap, no loss beyond half a step, weights exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.section import ConfigError
from privacy.secure.fixed_point import FixedPoint

BITS = st.sampled_from([8, 11, 12, 16, 19, 24, 32])


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 60), st.integers(0, 2**32), st.booleans(), st.sampled_from([0.01, 3.0]))
def test_a_sum_is_the_weighted_mean_within_a_step(
    bits: int, sites: int, seed: int, at_random: bool, reach: float
) -> None:
    numbers = FixedPoint(bits, reach, sites)
    draw = np.random.default_rng(seed)
    # Beyond the range by half, and all of one sign in the worst case: nothing may wrap.
    updates = draw.uniform(-1.5 * reach, 1.5 * reach, (sites, 7)).astype(np.float32)
    updates[:, 0], updates[:, 1] = 9 * reach, -9 * reach
    weights = [int(w) for w in draw.integers(1, 5000, sites)]
    scale = 8192
    total = np.zeros(numbers.length(7), numbers.dtype)
    for row, weight in zip(updates, weights, strict=True):
        words, _ = numbers.encode(row, weight, scale, draw if at_random else None)
        total = total + words
    mean, weight_sum = numbers.decode(total, scale)
    assert weight_sum == sum(weights)
    cut = np.clip(updates * (np.array(weights)[:, None] / scale).astype(np.float64), -reach, reach)
    exact = cut.sum(0) * scale / sum(weights)
    step = numbers.step * scale / sum(weights) * sites
    bound = (1.0 if at_random else 0.5) * step + 1e-6 * np.abs(exact)
    assert np.all(np.abs(mean - exact) <= bound + 1e-9)


@settings(max_examples=40, deadline=None)
@given(BITS, st.integers(0, 40), st.integers(0, 2**32))
def test_packed_words_come_back(bits: int, length: int, seed: int) -> None:
    numbers = FixedPoint(bits, 1.0, 3)
    words = np.random.default_rng(seed).integers(0, 2**bits, length).astype(numbers.dtype)
    packed = numbers.pack(words)
    assert len(packed) == -(-length * bits // 8)
    assert np.array_equal(numbers.unpack(packed, length), words)
    with pytest.raises(ValueError, match="bytes of masked numbers, got"):
        numbers.unpack(packed + b"x", length)


def test_random_rounding_is_right_on_average_where_nearest_is_not() -> None:
    numbers = FixedPoint(8, 1.0, 6)  # a step is 1/21
    small = np.full(40_000, 0.3 * numbers.step, np.float32)
    draw = np.random.default_rng(0)
    drawn = numbers.encode(small, 1, 1, draw)[0][: len(small)]
    nearest = numbers.encode(small, 1, 1)[0][: len(small)]
    assert nearest.max() == 0
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(small))


def test_what_is_cut_off_is_counted() -> None:
    numbers = FixedPoint(16, 1.0, 3)
    update = np.array([0.5, 2.0, -3.0, -1.0], np.float32)
    words, cut = numbers.encode(update, 1, 1)
    assert cut == 2
    mean, _ = numbers.decode(words, 1)
    assert np.allclose(mean, [0.5, 1.0, -1.0, -1.0], atol=numbers.step)


def test_bits_that_leave_nothing_for_a_site_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hold the sum of 200 sites, got 8; set more bits"):
        FixedPoint(8, 1.0, 200)
    assert FixedPoint(9, 1.0, 200).limit == 1
