"""An epsilon in words: with unit, delta, relation, accountant and what it rests on."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import spent
from privacy.events import Event
from privacy.statement import shown, state

RECORDS = Event("gaussian", "record", 1.0, 0.1, 20)
CENTRAL = Event("gaussian", "client", 2.0, noise_at="server")


def test_a_statement_says_all_that_an_epsilon_needs() -> None:
    told = state([RECORDS], "record", 1e-5)
    assert told.epsilon == spent([RECORDS], 1e-5)
    assert re.fullmatch(
        r"epsilon [\d.]+ per record \(delta 1e-05, zero-out, accountant PLD\)", str(told)
    )
    text = "; ".join(told.assumptions)
    assert "one record is one row" in text and "how many rows a site has is public" in text
    assert "Poisson sampling of records" in text
    assert "server" not in text and "held-out" not in text


@pytest.mark.parametrize(
    ("events", "unit", "said"),
    [
        ([CENTRAL], "client", "the server adds the noise, sees each update without it"),
        ([Event("skellam", "client", 2.0, noise_at="sites")], "client", "sites' shares"),
        ([RECORDS, CENTRAL], "record", "releases for another unit are counted"),
        ([RECORDS, Event("none", "record")], "record", "nothing is guaranteed"),
        ([Event("gaussian", "record", 2.0, part="held-out")], "record", "different records"),
    ],
)
def test_what_an_epsilon_rests_on(events: list[Event], unit: str, said: str) -> None:
    assert unit in ("record", "client")
    told = state(events, unit, 1e-5)  # type: ignore[arg-type]
    assert said in "; ".join(told.assumptions)
    assert said not in "; ".join(state([RECORDS], "record", 1e-5).assumptions)


def test_without_a_guarantee_json_says_null() -> None:
    told = state([Event("none", "record")], "record", 1e-5)
    assert told.as_dict()["epsilon"] is None
    assert "epsilon infinite per record" in str(told)
    assert state([RECORDS], "record", 1e-5).as_dict()["epsilon"] == spent([RECORDS], 1e-5)


@given(st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_an_epsilon_is_never_shown_smaller_than_it_is(epsilon: float) -> None:
    assert epsilon * (1 - 1e-9) <= float(shown(epsilon)) <= epsilon * 1.0101


def test_edges_of_what_is_shown() -> None:
    assert [shown(e) for e in (0.0, math.inf, 1.0, 2.345, 99.96)] == [
        "0", "infinite", "1", "2.35", "100",
    ]  # fmt: skip
