"""Epsilon against dp-accounting used on its own, against closed forms, and against itself."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

import privacy
from models.section import ConfigError
from privacy.accounting import accountant, calibrate, spent, within
from privacy.events import Event, of_unit

DELTA = 1e-5
SAMPLED = [
    (noise, rate, steps)
    for noise in (0.6, 1.0, 2.0, 5.0)
    for rate in (0.01, 0.05, 0.4)
    for steps in (2, 40, 600)
]
FULL = [(0.7, 1), (1.0, 10), (3.0, 50), (10.0, 7), (60.0, 300), (0.3, 4), (500.0, 20)]


def oracle(noise: float, rate: float, steps: int, delta: float, grid: float) -> float:
    """dp-accounting's PLD as its documentation uses it."""
    step: dp.DpEvent = dp.GaussianDpEvent(noise)
    if rate < 1:
        step = dp.PoissonSampledDpEvent(rate, step)
    made = PLDAccountant(value_discretization_interval=grid)
    made.compose(dp.SelfComposedDpEvent(step, steps))
    return float(made.get_epsilon(delta))


def analytic(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian release: Balle and Wang 2018, theorem 8, solved for epsilon."""

    def excess(epsilon: float) -> float:
        above = norm.cdf(0.5 / noise - epsilon * noise)
        below = norm.logcdf(-0.5 / noise - epsilon * noise)
        return float(above - math.exp(epsilon + below)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 400.0, xtol=1e-12))


def test_there_are_enough_settings() -> None:
    assert len(SAMPLED) >= 30


@pytest.mark.parametrize(("noise", "rate", "steps"), SAMPLED)
def test_epsilon_agrees_with_dp_accounting(noise: float, rate: float, steps: int) -> None:
    ours = privacy.epsilon(noise, rate, steps, DELTA)
    theirs = oracle(noise, rate, steps, DELTA, grid=min(1e-3, max(ours / 2e3, 2e-5)))
    assert ours == pytest.approx(theirs, rel=0.01, abs=1e-6)


@pytest.mark.parametrize(("noise", "steps"), FULL)
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_without_sampling_is_the_analytic_one(
    noise: float, steps: int, delta: float
) -> None:
    exact = analytic(noise / math.sqrt(steps), delta)
    ours = privacy.epsilon(noise, 1.0, steps, delta)
    assert ours == pytest.approx(exact, rel=1e-3, abs=1e-7)
    assert ours >= exact * (1 - 1e-9)


@pytest.mark.parametrize(("noise", "rate", "steps"), SAMPLED[::5])
def test_epsilon_is_below_the_bound_of_renyi(noise: float, rate: float, steps: int) -> None:
    made = RdpAccountant([2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256])
    step = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    made.compose(step, steps)
    assert privacy.epsilon(noise, rate, steps, DELTA) <= made.get_epsilon(DELTA) * 1.001


def test_a_small_epsilon_over_many_steps_is_not_overstated() -> None:
    # The usual grid of 1e-4 gives 0.060 here; a finer one converges to 0.0453.
    assert privacy.epsilon(20.0, 1e-3, 100_000, DELTA) == pytest.approx(0.0453, rel=0.01)


def test_epsilon_without_noise_or_with_hardly_any_is_infinite() -> None:
    assert privacy.epsilon(0.0, 0.5, 10, DELTA) == math.inf
    assert privacy.epsilon(1e-6, 0.5, 10, DELTA) == math.inf
    assert 300 < privacy.epsilon(0.1, 0.5, 10, DELTA) < 1000


def test_epsilon_of_wrong_numbers_is_refused() -> None:
    for arguments, wrong in [
        ((1.0, 0.1, 10, 0.0), "delta of at least 1e-12 and below 1, got 0;"),
        ((0.0, 0.1, 10, 1.0), "delta of at least 1e-12 and below 1, got 1;"),
        ((1.0, 0.0, 10, DELTA), "sample rate above 0 and at most 1 in an event, got 0;"),
        ((1.0, 1.5, 10, DELTA), "sample rate above 0 and at most 1 in an event, got 1.5;"),
        ((-1.0, 0.1, 10, DELTA), "noise multiplier above 0 in an event, got -1;"),
        ((math.inf, 0.1, 10, DELTA), "noise multiplier above 0 in an event, got inf;"),
        ((1.0, 0.1, 0, DELTA), "count of at least 1 in an event, got 0;"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(wrong)):
            privacy.epsilon(*arguments)


FIRST = Event("gaussian", "record", 1.2, 0.1, 50, run="a")
SECOND = Event("gaussian", "record", 0.9, 0.02, 200, run="b")


def test_two_runs_compose_as_one_joint_sequence() -> None:
    together = spent([FIRST, SECOND], DELTA)
    joint = PLDAccountant(value_discretization_interval=2e-4)
    for event in (FIRST, SECOND):
        step = dp.PoissonSampledDpEvent(
            event.sample_rate, dp.GaussianDpEvent(event.noise_multiplier)
        )
        joint.compose(step, event.count)
    assert together == pytest.approx(joint.get_epsilon(DELTA), rel=0.01)
    alone = [spent([event], DELTA) for event in (FIRST, SECOND)]
    assert max(alone) < together < sum(alone)  # the sum is what naive accounting would say


def test_rounds_of_a_run_compose_as_its_steps() -> None:
    rounds = [replace(FIRST, count=5, round=number) for number in range(10)]
    assert spent(rounds, DELTA) == spent([FIRST], DELTA)
    assert spent([], DELTA) == 0.0


def test_parts_of_one_split_compose_in_parallel_and_of_two_splits_do_not() -> None:
    training = replace(FIRST, split="s")
    held_out = Event("gaussian", "record", 4.0, count=10, part="held-out", split="s")
    assert spent([training, held_out], DELTA) == spent([training], DELTA)
    assert spent([held_out] * 40, DELTA) == spent([held_out] * 40 + [training], DELTA)
    other = replace(held_out, split="t")
    assert spent([training, other], DELTA) > 1.02 * spent([training], DELTA)

    promised = [replace(training, split=""), replace(held_out, split="")]
    assert spent(promised, DELTA) > 1.02 * spent([training], DELTA)


def test_within_is_what_spent_says() -> None:
    value = spent([FIRST, SECOND], DELTA)
    for limit, fits in [(value * 3, True), (value * 1.001, True), (value * 0.999, False)]:
        assert within([FIRST, SECOND], DELTA, limit) is fits
    assert not within([Event("none", "record")], DELTA, 1e9)
    assert within([], DELTA, 0.0)


def test_units_are_never_mixed() -> None:
    client = Event("gaussian", "client", 2.0)
    with pytest.raises(ConfigError, match="events of one unit to compose"):
        spent([FIRST, client], DELTA)
    seen = of_unit([client], "record")
    assert spent(seen, DELTA) == pytest.approx(analytic(1.0, DELTA), rel=1e-3)
    sampled = of_unit([replace(client, sample_rate=0.1)], "record")
    assert sampled[0].sample_rate == 1.0  # a changed record is not a left-out client
    assert spent(of_unit([FIRST, client], "client"), DELTA) == math.inf


def test_a_release_without_noise_spends_everything() -> None:
    plain = Event("none", "record")
    assert spent([FIRST, plain], DELTA) == math.inf
    assert spent(of_unit([plain], "client"), DELTA) == math.inf


def test_discrete_mechanisms_are_accounted_by_concentrated_dp() -> None:
    gaussian = [Event("gaussian", "client", 3.0, count=8)]
    discrete = [Event("discrete-gaussian", "client", 3.0, count=8)]
    skellam = [Event("skellam", "client", 3.0, count=8, xi=1e-3)]
    assert accountant(gaussian) == "PLD"
    assert accountant([*gaussian, *discrete]) == "RDP"
    assert spent(gaussian, DELTA) < spent(discrete, DELTA) < 1.25 * spent(gaussian, DELTA)
    assert spent(discrete, DELTA) < spent(skellam, DELTA) < 1.25 * spent(gaussian, DELTA)


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(1.0, 0.05, 200), (3.0, 0.4, 30), (8.0, 0.01, 1000), (0.1, 1.0, 1), (50.0, 1.0, 10)],
)
def test_calibration_is_the_inverse_of_epsilon(target: float, rate: float, steps: int) -> None:
    noise = calibrate(target, DELTA, rate, steps)
    reached = privacy.epsilon(noise, rate, steps, DELTA)
    assert 0.998 * target <= reached <= target
    assert privacy.epsilon(0.98 * noise, rate, steps, DELTA) > target


def test_calibration_is_monotone() -> None:
    by_target = [calibrate(target, DELTA, 0.1, 100) for target in (1.0, 2.0, 4.0)]
    assert by_target == sorted(by_target, reverse=True)
    by_steps = [calibrate(2.0, DELTA, 0.1, steps) for steps in (30, 100, 300)]
    assert by_steps == sorted(by_steps)
    by_rate = [calibrate(2.0, DELTA, rate, 100) for rate in (0.03, 0.1, 1.0)]
    assert by_rate == sorted(by_rate)
    by_delta = [calibrate(2.0, delta, 0.1, 100) for delta in (1e-4, 1e-5, 1e-6)]
    assert by_delta == sorted(by_delta)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((0.0, DELTA, 0.1, 10), "target epsilon above 0 and at most 1000, got 0;"),
        ((-2.0, DELTA, 0.1, 10), "target epsilon above 0 and at most 1000, got -2;"),
        ((math.nan, DELTA, 0.1, 10), "target epsilon above 0 and at most 1000, got nan;"),
        ((math.inf, DELTA, 0.1, 10), "target epsilon above 0 and at most 1000, got inf;"),
        ((1.0, 0.0, 0.1, 10), "delta of at least 1e-12 and below 1, got 0;"),
        ((1e-8, 1e-9, 1.0, 100), "epsilon of at least .* noise multiplier of 1e+06 reaches"),
        ((1.0, 0.2, 0.01, 10), "delta below 0.0956, the chance that a record or client takes part"),
        ((1.0, DELTA, 0.1, 0), "count of at least 1"),
    ],
)
def test_impossible_targets_are_refused_with_the_numbers(
    arguments: tuple[float, float, float, int], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong.replace("+", r"\+")):
        calibrate(*arguments)
