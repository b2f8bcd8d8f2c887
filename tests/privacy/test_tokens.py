"""Noise on single vectors: its epsilon, and that it is what the epsilon says."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from models.section import ConfigError
from privacy import noise
from privacy.tokens import adding, epsilon_of_vectors

NORMAL = stats.norm.cdf  # exact in the tails, too


def analytic_delta(epsilon: float, ratio: float) -> float:
    """Balle and Wang 2018, theorem 8: `ratio` is the noise over the sensitivity."""
    first, second = 0.5 / ratio - epsilon * ratio, -0.5 / ratio - epsilon * ratio
    return float(NORMAL(first) - math.exp(epsilon) * NORMAL(second))


@pytest.mark.parametrize("noise_multiplier", [0.5, 2.0, 10.0])
def test_epsilon_of_a_vector_is_that_of_the_analytic_gaussian(noise_multiplier: float) -> None:
    delta = 1e-5
    found = epsilon_of_vectors(noise_multiplier, delta)
    ratio = noise_multiplier / 2  # any other vector may be twice the norm away
    assert analytic_delta(found, ratio) <= delta * (1 + 1e-6)
    assert analytic_delta(found * 0.99, ratio) > delta
    assert epsilon_of_vectors(noise_multiplier, delta, 4) == pytest.approx(
        epsilon_of_vectors(noise_multiplier / 2, delta), rel=0.01
    )  # four vectors are one of twice the length
    assert epsilon_of_vectors(0.0, delta) == math.inf


def test_noise_is_in_proportion_to_the_norm_and_gaussian() -> None:
    add = adding(noise.seeded(3, "tokens"), 2.0)
    vectors = torch.zeros(400, 16, dtype=torch.float64)
    for norm in (1e-3, 50.0):
        drawn = (add(vectors, norm) / norm).flatten().numpy()
        assert stats.kstest(drawn, stats.norm(0, 2.0).cdf).pvalue > 1e-3
        assert stats.kstest(drawn, stats.norm(0, 2.2).cdf).pvalue < 1e-3  # it has power
    again = adding(noise.seeded(3, "tokens"), 2.0)
    assert torch.equal(again(vectors, 1.0), adding(noise.seeded(3, "tokens"), 2.0)(vectors, 1.0))


def test_no_noise_is_refused() -> None:
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="a noise multiplier above 0 for activations, got"):
            adding(noise.secure(), value)
