"""What events spend together, and the noise that a target needs.

Google's dp-accounting does the composition, with privacy loss distributions (PLD) where they are
known for every event, else with Renyi divergences (RDP). Zeroing out one unit of a Poisson-sampled,
clipped Gaussian sum has the loss of adding or removing it, the relation accounted here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from models.section import ConfigError
from privacy.events import Event, Mechanism

# Above this an epsilon has no meaning, and is reported as infinite.
_MAX_EPSILON = 1e6
_MAX_TARGET = 1000.0
_MAX_NOISE = 1e6
_MIN_DELTA = 1e-12  # below, the arithmetic of the accountants is not precise enough
# A calibrated noise multiplier spends between this share of its target, and the target.
_CLOSE = 0.999
_ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` Gaussian releases, each of Poisson-sampled units; raises ConfigError.

    For adding or removing (or zeroing out) one unit, with PLD: within 1 % of dp-accounting, never
    below the true one, infinite without noise. `noise_multiplier` is in units of the sensitivity.
    """
    if noise_multiplier == 0:
        _check_delta(delta)
        return math.inf
    return spent([Event("gaussian", "record", noise_multiplier, sample_rate, steps)], delta)


def spent(events: Iterable[Event], delta: float) -> float:
    """Epsilon that events of one unit spend together; raises ConfigError where units differ.

    Parts of one known split touch different records: the result is the largest over the parts. As
    soon as the events name more than one split, a record may have been in every part: all add up.
    """
    _check_delta(delta)
    groups = _together(list(events))
    return max((_composed(group, delta) for group in groups), default=0.0)


def within(events: Iterable[Event], delta: float, limit: float) -> bool:
    """Whether `spent` is at most `limit`, without computing it where a rough bound settles that."""
    _check_delta(delta)
    return all(
        _renyi(group, delta) <= limit or _composed(group, delta) <= limit
        for group in _together(list(events))
    )


def _together(events: list[Event]) -> list[list[Event]]:
    """The events that may touch one and the same record, for each kind of record."""
    if len({event.unit for event in events}) > 1:
        raise ConfigError(
            "Expected events of one unit to compose, got several; use "
            "events.of_unit to see all of them as one."
        )
    splits = {(event.split, event.site) for event in events}
    parts = {event.part for event in events}
    if len(splits) > 1 or len(parts) < 2 or not next(iter(splits))[0]:
        return [events] if events else []
    return [[event for event in events if event.part == part] for part in sorted(parts)]


def accountant(events: Iterable[Event]) -> str:
    """Name of the accountant that `spent` uses for these events: `PLD` or `RDP`."""
    return (
        "RDP"
        if any(event.mechanism in ("discrete-gaussian", "skellam") for event in events)
        else "PLD"
    )


@lru_cache(maxsize=64)
def calibrate(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    mechanism: Mechanism = "gaussian",
) -> float:
    """The smallest noise multiplier, to 0.1 % in epsilon, with which `steps` releases spend at most
    `epsilon`; raises ConfigError with the numbers where there is none.
    """
    _check_delta(delta)
    if not 0 < epsilon <= _MAX_TARGET:
        raise ConfigError(
            f"Expected a target epsilon above 0 and at most {_MAX_TARGET:g}, got {epsilon:g}; "
            "set one within, or name the noise multiplier."
        )
    event = Event(mechanism, "record", 1.0, sample_rate, steps)
    check_chance(sample_rate, steps, delta)
    return _search(event, epsilon, delta)


def check_chance(sample_rate: float, steps: int, delta: float) -> None:
    """Refuse a delta within which all of a unit may leave without noise; raises ConfigError.

    With a delta of at least the chance that a unit takes part at all, epsilon is 0 for any noise.
    """
    chance = -math.expm1(steps * math.log1p(-sample_rate)) if sample_rate < 1 else 1.0
    if chance <= delta:
        raise ConfigError(
            f"Expected a delta below {chance:.3g}, the chance that a record or client takes part "
            f"at all (sample rate {sample_rate:g}, {steps} steps), got {delta:g}, with which no "
            "noise at all would pass; lower delta."
        )


def _search(event: Event, target: float, delta: float) -> float:
    """Bisect the noise multiplier, guided by the slope of epsilon over noise on log scales."""

    def at(noise: float) -> float:
        return _composed([replace(event, noise_multiplier=noise)], delta)

    low, high = _bracket(event, target, delta)
    at_low, at_high = math.inf, at(high)
    while at_high < _CLOSE * target and high / low > 1 + 1e-9:
        between = math.sqrt(low * high)
        if math.isfinite(at_low) and 0 < at_high < at_low:
            share = math.log(at_high / (target * (1 + _CLOSE) / 2)) / math.log(at_high / at_low)
            between = high * (low / high) ** min(max(share, 0.05), 0.95)
        value = at(between)
        if value <= target:
            high, at_high = between, value
        else:
            low, at_low = between, value
    return high


def _bracket(event: Event, target: float, delta: float) -> tuple[float, float]:
    """A noise multiplier that is too small and one that is enough."""
    high = 1.0
    while _renyi([replace(event, noise_multiplier=high)], delta) > target:
        high *= 2
        if high > _MAX_NOISE:
            lowest = _composed([replace(event, noise_multiplier=_MAX_NOISE)], delta)
            raise ConfigError(
                f"Expected an epsilon of at least {lowest:.3g}, which a noise multiplier of "
                f"{_MAX_NOISE:g} reaches (delta {delta:g}, sample rate {event.sample_rate:g}, "
                f"{event.count} steps), got {target:g}; raise epsilon, or train for fewer steps."
            )
    low = high / 2
    while _composed([replace(event, noise_multiplier=low)], delta) <= target:
        low, high = low / 2, low
    return low, high


def _composed(events: Collection[Event], delta: float) -> float:
    """Epsilon of events that all touch the same unit."""
    if any(event.mechanism == "none" for event in events):
        return math.inf
    rough = _renyi(events, delta)
    if accountant(events) == "RDP" or not 0 < rough < _MAX_EPSILON:
        return rough if rough < _MAX_EPSILON else math.inf
    # Each release's loss is rounded to a grid, which adds up to grid**2 / 4 to its variance. Of all
    # together that must be little beside the result, and so must its square root. The usual grid of
    # 1e-4 overstates an epsilon of 0.05 over 100,000 steps by a third.
    steps, finest = sum(event.count for event in events), max(map(_finest, events))
    while True:
        wanted = min(1e-3 * rough, 0.01 * rough / math.sqrt(steps), math.sqrt(4e-3 * rough / steps))
        grid = min(max(wanted, finest), 1.0)
        value = min(_pld(events, delta, grid), rough)
        if value >= rough / 3 or grid <= finest:
            return value
        rough = value


def _finest(event: Event) -> float:
    """A grid that one release's losses (out to 10 standard deviations) meet in 50,000 points."""
    loss = 10 / event.noise_multiplier + 0.5 / event.noise_multiplier**2
    if event.sample_rate < 1 and loss < 100:
        loss = math.log1p(event.sample_rate * math.expm1(loss))
    return max(loss / 5e4, 1e-9)


def _pld(events: Collection[Event], delta: float, grid: float) -> float:
    from dp_accounting.pld import PLDAccountant

    return float(_composing(PLDAccountant(value_discretization_interval=grid), events, delta))


def _renyi(events: Collection[Event], delta: float) -> float:
    """An upper bound within milliseconds; infinite without noise."""
    from dp_accounting.rdp import RdpAccountant

    return float(_composing(RdpAccountant(_ORDERS), events, delta))


def _composing(accountant: Any, events: Collection[Event], delta: float) -> float:
    kinds: Counter[Event] = Counter()
    for event in events:
        kinds[_kind(event)] += event.count
    for kind in sorted(kinds, key=repr):
        accountant.compose(_dp_event(kind), kinds[kind])
    return float(accountant.get_epsilon(delta))


def _kind(event: Event) -> Event:
    """The event without what does not change its loss."""
    return Event(event.mechanism, "record", event.noise_multiplier, event.sample_rate, xi=event.xi)


def _dp_event(event: Event) -> Any:
    """One release of an event, in the terms of dp-accounting."""
    import dp_accounting as dp

    if event.mechanism == "none":
        return dp.NonPrivateDpEvent()
    if event.mechanism != "gaussian":
        return dp.ZCDpEvent(rho=0.5 / event.noise_multiplier**2, xi=event.xi)
    gaussian = dp.GaussianDpEvent(event.noise_multiplier)
    if event.sample_rate == 1:
        return gaussian
    return dp.PoissonSampledDpEvent(event.sample_rate, gaussian)


def _check_delta(delta: float) -> None:
    if not _MIN_DELTA <= delta < 1:
        raise ConfigError(
            f"Expected a delta of at least {_MIN_DELTA:g} and below 1, got {delta:g}; set one "
            "well below one over the number of units."
        )
