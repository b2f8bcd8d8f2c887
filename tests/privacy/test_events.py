"""Events: what is coherent, and what survives a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.section import ConfigError
from privacy.events import Event, of_unit

WHOLE = Event(
    "gaussian", "record", 1.1, 0.25, 12, part="held-out", split="s", run="r", round=3, site="north"
)


def test_an_event_survives_a_file() -> None:
    assert Event.of_dict(json.loads(json.dumps(WHOLE.as_dict()))) == WHOLE


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"mechanism": "gausian"}, "Unknown mechanism of an event 'gausian'. Did you mean"),
        ({"unit": "token"}, "Unknown unit of an event 'token'.*Choices: client, position, record"),
        ({"relation": "replace"}, "Unknown relation of an event"),
        ({"relation": "replace-one"}, "relation 'zero-out' in an event of unit 'record', got"),
        ({"part": "test"}, "Unknown part of an event"),
        ({"noise_at": "nowhere"}, "Unknown noise_at of an event"),
        ({"noise": 1.0}, "Unknown field of an event 'noise'"),
        ({"noise_multiplier": float("nan")}, "noise multiplier above 0 in an event, got nan"),
        ({"mechanism": "discrete-gaussian"}, "no sampling with 'discrete-gaussian'"),
        ({"xi": 0.1}, "xi of 0, or above 0 with 'skellam' in an event, got 0.1"),
        ({"count": -1}, "count of at least 1 in an event, got -1"),
        ({"noise_multiplier": "much"}, "Expected the fields of an event"),
    ],
)
def test_an_incoherent_event_is_refused(change: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        Event.of_dict(WHOLE.as_dict() | change)


def test_an_event_that_lacks_a_field_is_refused() -> None:
    values = WHOLE.as_dict()
    del values["unit"]
    with pytest.raises(ConfigError, match=r"Expected the fields of an event.*unit"):
        Event.of_dict(values)


def test_seen_as_its_own_unit_an_event_stays_itself() -> None:
    assert of_unit([WHOLE], "record") == [WHOLE]
    assert of_unit([WHOLE], "client")[0].mechanism == "none"


def test_noise_for_a_position_says_nothing_of_a_record_and_stands_by_itself() -> None:
    vectors = Event("gaussian", "position", 2.0, relation="replace-one", count=4)
    for unit in ("record", "client"):
        seen = vectors.seen_as(unit)
        assert (seen.unit, seen.mechanism, seen.relation) == (unit, "none", "zero-out")
    assert of_unit([WHOLE, vectors, Event("none", "record")], "position") == [vectors]
