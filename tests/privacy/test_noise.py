"""Noise on a lattice: the right scale, and nothing to read from its low bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from models.section import ConfigError
from privacy import noise

COUNT = 50_000


def p_value(drawn: Tensor, std: float) -> float:
    return float(stats.kstest(drawn.numpy() / std, "norm").pvalue)


@pytest.mark.parametrize("std", [1e-6, 1.0, 1.9, 3e4])
@pytest.mark.parametrize("source", [noise.secure(), noise.seeded(5)], ids=["secure", "seeded"])
def test_the_right_scale_is_accepted_and_two_wrong_ones_are_not(
    source: noise.Source, std: float
) -> None:
    # A sound secure source fails the first line once in a million runs.
    assert p_value(noise.gaussian((COUNT,), std, source), std) > 1e-6
    value = torch.full((COUNT,), 0.7 * std)
    assert p_value(noise.add_gaussian(value, std, source) - value.double(), std) > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert p_value(noise.gaussian((COUNT,), std * wrong, source), std) < 1e-9
        assert p_value(noise.add_gaussian(value, std * wrong, source) - value, std) < 1e-9


def low_bits(values: Tensor, step: float) -> set[float]:
    """What is left of values beyond the lattice, which an attacker would read."""
    return set(torch.remainder(values.double() / step, 1.0).tolist())


@settings(max_examples=25, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_released_values_always_lie_on_the_lattice(secret: float, std: float) -> None:
    value = torch.full((64,), secret, dtype=torch.float64)
    released = noise.add_gaussian(value, std, noise.seeded(1))
    assert low_bits(released, noise.step(std)) == {0.0}


def test_the_low_bits_of_a_plain_sum_give_the_value_away() -> None:
    """The leak that the lattice closes: its control has to find it."""
    step, std = 2.0**-20, 1.0
    on_lattice = noise.gaussian((1000,), std, noise.seeded(2))
    coarse = (on_lattice / step).round() * step  # stands for a plain sampler's coarser grid
    assert low_bits(coarse + 0.0, step) != low_bits(coarse + 1 / 3, step)
    here = [noise.add_gaussian(torch.full((1000,), x), std, noise.seeded(2)) for x in (0.0, 1 / 3)]
    assert low_bits(here[0], noise.step(std)) == low_bits(here[1], noise.step(std))


def test_what_is_finer_than_the_lattice_is_not_released() -> None:
    std = 1.0
    marked = torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64)
    hidden = marked + noise.step(std) * torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    assert bool((marked != hidden).all())
    released = [noise.add_gaussian(v, std, noise.seeded(3)) for v in (marked, hidden)]
    assert torch.equal(*released)


@pytest.mark.parametrize("std", [0.5, 0.75, 1.0, 1.999, 2.0, 1e-9, 1e9])
def test_the_step_is_a_power_of_two_far_below_the_noise(std: float) -> None:
    mantissa, _ = math.frexp(noise.step(std))
    assert mantissa == 0.5
    assert 2.0**35 <= std / noise.step(std) < 2.0**36


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.1, 20), st.integers(1, 10**9), st.integers(0, 2**31))
def test_the_noise_makes_up_for_rounding(
    sensitivity: float, multiplier: float, size: int, seed: int
) -> None:
    std = noise.std_for(sensitivity, multiplier, size)
    moved = sensitivity + noise.step(std) * math.sqrt(size)
    assert multiplier * moved <= std * (1 + 1e-12)
    assert std <= multiplier * sensitivity * (1 + 1e-4 * multiplier)
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, 1000, generator=generator, dtype=torch.float64)
    rounded = [(v / noise.step(std)).round() * noise.step(std) for v in (one, other)]
    apart = float((rounded[0] - rounded[1]).norm() - (one - other).norm())
    assert apart <= noise.step(std) * math.sqrt(1000)


def test_seeds_and_purposes_repeat_and_are_told_apart() -> None:
    def drawn(*purpose: str | int) -> Tensor:
        return noise.gaussian((4,), 1.0, noise.seeded(7, *purpose))

    assert torch.equal(drawn("round", 1), drawn("round", 1))
    assert not torch.equal(drawn("round", 1), drawn("round", 2))
    assert not torch.equal(
        drawn("round", 1), noise.gaussian((4,), 1.0, noise.seeded(8, "round", 1))
    )
    assert not torch.equal(
        noise.gaussian((4,), 1.0, noise.secure()), noise.gaussian((4,), 1.0, noise.secure())
    )
    assert (noise.secure().secure, noise.seeded(0).secure) == (True, False)


def test_shapes_and_types() -> None:
    source = noise.seeded(0)
    assert noise.gaussian((2, 3), 1.0, source).shape == (2, 3)
    assert noise.gaussian((), 1.0, source).dtype == torch.float64
    assert noise.add_gaussian(torch.zeros(2, 3), 1.0, source).shape == (2, 3)
    assert noise.add_gaussian(torch.zeros(0), 1.0, source).shape == (0,)
    for sampler in (noise.discrete_gaussian, noise.skellam):
        drawn = sampler((3, 2), 2.0, source)
        assert (drawn.shape, drawn.dtype) == ((3, 2), torch.int64)


def test_without_noise_the_value_stays() -> None:
    value = torch.tensor([1 / 3, -2.0])
    assert torch.equal(noise.add_gaussian(value, 0.0, noise.secure()), value.double())
    assert not noise.gaussian((3,), 0.0, noise.secure()).any()
    assert noise.std_for(0.0, 1.0, 10) == 0.0


def test_large_values_keep_their_noise() -> None:
    """Beyond 2^53 steps a float64 is coarser than the lattice, but the noise is added before."""
    released = noise.add_gaussian(torch.full((COUNT,), 2.0**22), 1.0, noise.seeded(4))
    assert p_value(released - 2.0**22, 1.0) > 1e-6


def test_what_cannot_be_released_is_refused() -> None:
    for bad in (math.nan, math.inf, 1e12):
        with pytest.raises(ConfigError, match=r"Expected finite values below .*; clip the values"):
            noise.add_gaussian(torch.tensor([0.0, bad], dtype=torch.float64), 1.0, noise.secure())
    for std in (1e-300, math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="check the clipping norm"):
            noise.step(std)


def test_samplers_agree_with_their_scale() -> None:
    for sampler in (noise.discrete_gaussian, noise.skellam):
        drawn = sampler((COUNT,), 40.0, noise.seeded(9)).numpy()
        assert np.std(drawn) == pytest.approx(40.0, rel=0.02)
