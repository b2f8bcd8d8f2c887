"""The adaptive clipping norm: the right direction from far away, its noise and its accounting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.section import ConfigError
from privacy import accounting, noise
from privacy.adaptive import Adaptive
from privacy.events import Event

NORMS = np.random.default_rng(0).lognormal(mean=1.0, sigma=0.5, size=101)


def followed(start: float, quantile: float, *, multiplier: float, rounds: int = 500) -> list[float]:
    rule = Adaptive(quantile, 0.2)
    norms = [start]
    for round_ in range(rounds):
        source = noise.seeded(1, round_)
        norms.append(rule.next_norm(norms[-1], NORMS, multiplier, len(NORMS), source))
    return norms


@pytest.mark.parametrize("multiplier", [0.0, 1.0])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3], ids=["from far below", "from far above"])
def test_the_norm_moves_to_the_quantile(start: float, quantile: float, multiplier: float) -> None:
    norms = followed(start, quantile, multiplier=multiplier)
    target = float(np.quantile(NORMS, quantile))
    assert abs(math.log(norms[-1] / target)) < 0.35
    early = norms[:10]
    assert early == sorted(early, reverse=start > target), "the first steps go the wrong way"


def test_a_step_worked_by_hand() -> None:
    rule = Adaptive(0.5, 0.2)
    # Three of four within the norm (one exactly at it): the share is 0.75.
    moved = rule.next_norm(2.0, [0.0, 1.0, 2.0, 3.0], 0.0, 4, noise.secure())
    assert moved == pytest.approx(2.0 * math.exp(-0.2 * 0.25))


def test_missing_sites_count_as_half() -> None:
    rule = Adaptive(0.5, 0.2)
    assert rule.next_norm(2.0, [], 0.0, 4, noise.secure()) == 2.0
    assert rule.next_norm(2.0, [9.0, 0.0], 0.0, 4, noise.secure()) == 2.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 7), st.floats(0.1, 9))
def test_one_site_moves_the_count_by_half(norms: list[float], chosen: int, bound: float) -> None:
    rule, expected = Adaptive(0.5, 1.0), len(norms)
    left = norms[: chosen % expected] + norms[chosen % expected + 1 :]

    def share(values: list[float]) -> float:
        moved = rule.next_norm(bound, values, 0.0, expected, noise.secure())
        return -math.log(moved / bound) * expected

    assert abs(share(norms) - share(left)) == pytest.approx(0.5)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("expected", [4.0, 1000.0])
def test_updates_and_count_together_spend_what_one_release_may(
    multiplier: float, expected: float
) -> None:
    rule = Adaptive(0.5, 0.2)
    updates = rule.update_multiplier(multiplier, expected)
    count = rule.count_std(multiplier, expected) / 0.5
    assert multiplier < updates < 1.04 * multiplier
    together = accounting.spent(
        [Event("gaussian", "client", updates), Event("gaussian", "client", count)], 1e-5
    )
    one = accounting.spent([Event("gaussian", "client", multiplier)], 1e-5)
    assert together == pytest.approx(one, rel=0.01)


def test_the_noise_of_the_count_is_there() -> None:
    rule = Adaptive(0.5, 1.0, count_noise=3.0)
    moved = [
        math.log(rule.next_norm(1.0, [], 1.0, 10, noise.seeded(0, i))) * 10 for i in range(2000)
    ]
    assert np.std(moved) == pytest.approx(3.0, rel=0.1)
    assert abs(np.mean(moved)) < 0.3


def test_a_count_that_spends_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip-count-noise above 1, half .*got 0.5; raise it"):
        Adaptive(0.5, 0.2, count_noise=0.5).update_multiplier(2.0, 10)
    assert Adaptive(0.5, 0.2, count_noise=0.5).update_multiplier(0.0, 10) == 0.0
