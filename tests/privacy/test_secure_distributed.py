"""Noise in shares: the sum has the right scale, one site moves it by no more than is accounted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from models.section import ConfigError
from privacy import noise as sources
from privacy.client_level import clipped
from privacy.secure.distributed import Noise
from privacy.secure.fixed_point import FixedPoint, Words
from privacy.secure.intake import SumIntake
from privacy.secure.site import Session
from privacy.secure.terms import threshold
from tests.privacy.secure_groups import Group, terms, update

NOISE = Noise(clip_norm=0.5, multiplier=1.3, rounding=1.0)
SIZE = 20_000


@dataclass
class Noisy(Group):
    """Sites that add their shares of the noise; each has drawn it once."""

    drawn: dict[str, Words] = field(default_factory=dict)

    def numbers(self, name: str) -> Words:
        t = self.terms
        if name not in self.drawn:
            assert t.noise is not None
            source, rounding = sources.seeded(3, name), np.random.default_rng(len(self.drawn))
            self.drawn[name], cut = t.noise.encode(
                t.numbers, update(name, t.size), t.threshold, source, rounding
            )
            assert not cut
        return self.drawn[name]


def noise_of_a_sum(noise: Noise, gone: tuple[str, ...]) -> NDArray[np.float64]:
    """What the opened sum has beside the clipped updates of the sites that stayed."""
    group = Noisy(terms(size=SIZE, noise=noise))
    words = group.advertise().share().mask(gone).confirm(gone).opened(gone)
    assert np.array_equal(words, group.plain(group.server.active))
    total, weight = group.terms.numbers.decode(words, 1, divisor=1)
    assert weight == len(group.server.active)
    exact = sum(
        clipped(torch.from_numpy(update(name, SIZE)), noise.clip_norm).double().numpy()
        for name in group.server.active
    )
    return total - exact


def p_value(drawn: NDArray[np.float64], std: float) -> float:
    return float(stats.kstest(drawn / std, "norm").pvalue)


def test_the_threshold_holds_the_right_scale_and_two_wrong_ones_are_found() -> None:
    """Five of six sites are just enough: through rounding, noise, masks and their removal."""
    right = NOISE.multiplier * NOISE.clip_norm
    assert p_value(noise_of_a_sum(NOISE, ("cat",)), right) > 1e-6
    assert p_value(noise_of_a_sum(NOISE, ()), right * math.sqrt(6 / 5)) > 1e-6
    for wrong in (2 / 3, 3 / 2):
        other = replace(NOISE, multiplier=NOISE.multiplier * wrong)
        assert p_value(noise_of_a_sum(other, ("cat",)), right) < 1e-9


def test_a_site_that_drops_out_counts_as_zero() -> None:
    quiet = Noise(clip_norm=10.0, multiplier=1e-7, rounding=0.5)
    group = Noisy(terms(noise=quiet))
    words = group.advertise().share().mask(["cat"]).confirm().opened()
    intake = SumIntake([group.server], "masked", lambda *asked: {}, 1.0, 1e4)
    intake._keep(group.server, words, 1)
    got = intake._received()
    stayed = [name for name in group.terms.members if name != "cat"]
    total = np.sum([update(name, 5) for name in stayed], axis=0)
    assert got.counted == tuple(stayed) and got.weights == {"group 1": 6.0}
    assert np.allclose(got.rows["group 1"].numpy(), total / 6, atol=1e-5)


SIZES = st.integers(1, 40)
NOISES = st.builds(Noise, st.floats(1e-3, 1e3), st.floats(1e-3, 30), st.sampled_from([0.5, 1.0]))


def lattice(noise: Noise, bits: int, range_: float, sites: int, size: int) -> FixedPoint:
    try:
        return noise.numbers(bits, range_, sites, threshold(sites), size)
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=60, deadline=None)
@given(
    st.data(), NOISES, st.integers(10, 32), st.floats(1e-3, 1e3), st.integers(3, 50), SIZES,
    st.integers(0, 9),
)  # fmt: skip
def test_a_site_moves_the_sum_by_at_most_its_sensitivity(
    data: st.DataObject, noise: Noise, bits: int, range_: float, sites: int, size: int, seed: int
) -> None:
    numbers = lattice(noise, bits, range_, sites, size)
    values = st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=size, max_size=size)
    update_D = np.array(data.draw(values), np.float32)

    def sent(vector_D: NDArray[np.float32]) -> NDArray[np.int64]:
        rounding = np.random.default_rng(seed) if noise.rounding == 1.0 else None
        source = sources.seeded(seed)
        words, _ = noise.encode(numbers, vector_D, threshold(sites), source, rounding)
        return words[:size].astype(np.int64)

    moved = (sent(update_D) - sent(np.zeros(size, np.float32))) % 2**bits
    moved = np.where(moved < 2 ** (bits - 1), moved, moved - 2**bits).astype(np.float64)
    assert np.linalg.norm(moved) <= noise.sensitivity(numbers, size) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(NOISES, st.integers(10, 32), st.floats(1e-3, 1e3), st.integers(3, 200), SIZES)
def test_the_sum_has_room_for_the_noise_of_all_sites(
    noise: Noise, bits: int, range_: float, sites: int, size: int
) -> None:
    numbers, least = lattice(noise, bits, range_, sites, size), threshold(sites)
    share = noise.share(numbers, least, size)
    free = 2 ** (bits - 1) - 1 - sites * numbers.limit
    chance = 2 * size * math.exp(-0.5 * (free / share) ** 2 / sites)  # sub-Gaussian tails
    assert chance <= 2.0**-40 * (1 + 1e-6)
    wanted = noise.multiplier * noise.sensitivity(numbers, size)
    assert wanted <= share * math.sqrt(least) <= wanted * (1 + 1e-8)
    assert numbers.range <= noise.clip_norm


def test_a_sum_of_shares_is_as_private_as_one_discrete_gaussian() -> None:
    """Renyi divergence by exact convolution, at the least share, against what is accounted."""
    std, shares = 4.0, 3
    points = np.arange(-60, 61)
    one = np.exp(-(points**2) / (2 * std**2))
    sum_ = np.convolve(np.convolve(one, one), one)
    sum_ /= sum_.sum()
    for order, moved in ((2, 12), (8, 5), (32, 1), (1.5, 20)):
        here, there = sum_[moved:], sum_[:-moved]
        logs = order * np.log(here) + (1 - order) * np.log(there)
        divergence = special.logsumexp(logs) / (order - 1)
        accounted = order * moved**2 / (2 * shares * std**2)
        assert divergence == pytest.approx(accounted, rel=1e-9)


def test_numbers_without_room_are_refused() -> None:
    for bits, size in ((8, 500), (16, 10**9)):
        with pytest.raises(ConfigError, match=rf"noise on {size} values, got {bits}; set more"):
            NOISE.numbers(bits, 1.0, 6, 5, size)
    assert NOISE.numbers(32, 1.0, 100, 67, 10**8).step < 1e-5


def test_an_update_that_is_not_finite_is_refused() -> None:
    numbers = NOISE.numbers(32, 1.0, 6, 5, 2)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ConfigError, match=r"finite update .*; lower train"):
            NOISE.encode(numbers, np.array([0, wrong], np.float32), 5, sources.seeded(0))


def test_sites_remember_the_noise_and_sign_it() -> None:
    session = Session("advertised", "ann", terms(noise=NOISE))
    assert Session.loads(session.dumps()).terms == session.terms
    assert session.terms.digest != terms().digest
    assert session.terms.digest != terms(noise=replace(NOISE, multiplier=1.2)).digest
