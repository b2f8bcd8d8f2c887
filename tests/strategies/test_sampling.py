"""Sampling of sites: by name, seeded, fair, with an error that says what to do."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.sampling import (
    TooFewSites,
    fixed_share,
    poisson,
    rotation,
    sample,
    seeded_chance,
)

NAMES = st.lists(st.text(max_size=5), min_size=1, max_size=12, unique=True)


@given(NAMES, st.floats(0.01, 1.0), st.integers(0, 99), st.integers(1, 99), st.data())
def test_a_draw_depends_on_names_not_on_their_order(
    names: list[str], fraction: float, seed: int, round_: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(names))
    drawn = sample(names, fraction, 1, seed, round_)
    assert drawn == sample(shuffled, fraction, 1, seed, round_)
    assert drawn == tuple(sorted(set(drawn))) and set(drawn) <= set(names)
    assert len(drawn) >= fraction * len(names) - 1e-6


@pytest.mark.parametrize(
    ("count", "fraction", "least", "expected"),
    [(10, 1.0, 1, 10), (10, 0.5, 1, 5), (30, 0.1, 1, 3), (10, 0.01, 1, 1), (10, 0.1, 4, 4)],
)
def test_number_of_sites(count: int, fraction: float, least: int, expected: int) -> None:
    names = [f"site-{i:02d}" for i in range(count)]
    assert len(sample(names, fraction, least, 0, 1)) == expected


def test_rounds_and_seeds_draw_differently_and_everyone_gets_a_turn() -> None:
    names = [f"site-{i:02d}" for i in range(10)]
    draws = [sample(names, 0.3, 1, seed=7, round=r) for r in range(1, 2001)]
    assert len(set(draws)) > 100
    assert sample(names, 0.3, 1, 7, 1) != sample(names, 0.3, 1, 8, 1)
    counts = [sum(name in draw for draw in draws) for name in names]
    # 2000 draws of 3 in 10: 600 expected, standard deviation 20.5; five of them allowed.
    assert all(abs(count - 600) < 103 for count in counts), counts


def test_a_site_that_leaves_displaces_nobody_else() -> None:
    names = [f"site-{i:02d}" for i in range(10)]
    drawn = sample(names, 0.4, 1, 0, 1)
    gone = drawn[0]
    fewer = sample([name for name in names if name != gone], 0.4, 1, 0, 1)
    assert set(drawn) - {gone} <= set(fewer) and len(fewer) == 4


def test_global_random_state_is_neither_used_nor_touched() -> None:
    names = [f"site-{i}" for i in range(10)]
    random.seed(1)
    state = random.getstate()
    first = sample(names, 0.3, 1, 0, 1)
    assert random.getstate() == state
    random.seed(2)
    assert sample(names, 0.3, 1, 0, 1) == first


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"]])
def test_too_few_sites_say_what_to_do(names: list[str]) -> None:
    with pytest.raises(TooFewSites, match=r"at least 2 sites .*connect more SuperNodes or lower"):
        sample(names, 1.0, 2, 0, 1)


SITES = [f"site-{i}" for i in range(40)]


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_poisson_draws_each_site_by_itself_at_the_rate(rate: float) -> None:
    drawn = poisson(rate, 1, partial(seeded_chance, 5))
    rounds = [set(drawn.draw(SITES, round_)) for round_ in range(1, 501)]
    for site in SITES:  # at the rate, within five standard errors
        taken = sum(site in chosen for chosen in rounds)
        assert abs(taken - 500 * rate) <= 5 * math.sqrt(500 * rate * (1 - rate)) + 1e-9
    pairs = sum({"site-0", "site-1"} <= chosen for chosen in rounds)
    both = rate**2
    assert abs(pairs - 500 * both) <= 5 * math.sqrt(500 * both * (1 - both)) + 1e-9
    spread = {len(chosen) for chosen in rounds}
    assert len(spread) == 1 if rate == 1.0 else len(spread) > 5


def test_poisson_is_seeded_and_does_not_mind_order_and_others() -> None:
    drawn = poisson(0.3, 1, partial(seeded_chance, 5))
    assert drawn.draw(SITES, 3) == drawn.draw(SITES[::-1], 3)
    assert drawn.draw(SITES, 3) != drawn.draw(SITES, 4)
    assert drawn.draw(SITES, 3) != poisson(0.3, 1, partial(seeded_chance, 6)).draw(SITES, 3)
    fewer = drawn.draw(SITES[:20], 3)
    assert fewer == tuple(name for name in drawn.draw(SITES, 3) if name in SITES[:20])


def test_a_poisson_round_may_ask_nobody_and_needs_no_answer() -> None:
    drawn = poisson(0.01, 1, partial(seeded_chance, 0))
    assert () in {drawn.draw(["only"], round_) for round_ in range(1, 20)}
    assert [drawn.required(asked) for asked in (0, 1, 40)] == [0, 0, 0]
    with pytest.raises(TooFewSites, match=r"at least 3 sites \(strategy.min-sites\), got 1"):
        poisson(0.5, 3, partial(seeded_chance, 0)).draw(["only"], 1)


@pytest.mark.parametrize("period", [1, 2, 5])
def test_in_a_rotation_each_site_has_one_turn_in_every_period(period: int) -> None:
    turns = rotation(period, 1, seed=2)
    rounds = [turns.draw(SITES, round_) for round_ in range(1, 4 * period + 1)]
    for site in SITES:
        taken = [round_ for round_, chosen in enumerate(rounds) if site in chosen]
        assert len(taken) == 4 and {b - a for a, b in itertools.pairwise(taken)} == {period}
    assert turns.draw(SITES[:7], 1) == tuple(s for s in rounds[0] if s in SITES[:7])
    assert turns.required(3) == 0


def test_a_fixed_share_needs_its_quorum() -> None:
    share = fixed_share(0.5, 2, 0, 0.28)
    assert share.draw(SITES, 1) == sample(SITES, 0.5, 2, 0, 1)
    assert [share.required(asked) for asked in (4, 25, 100)] == [2, 7, 28]
