"""Sampling of sites: by name, seeded, fair, with an error that says what to do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.sampling import TooFewSites, sample

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
