"""What the report and the terminal are made of: the results table, numbers, labels, colours."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_app.report import results_table
from flower_app.report.figures import byte_ticks
from flower_app.report.numbers import clean, duration, fit, number, safe, score, size
from flower_app.report.style import DARK, LIGHT
from flower_app.report.svg import spread


def test_terminal_table_line_by_line() -> None:
    summary = {
        "metric": "perplexity",
        "zero_shot": {"loss": 4.58, "perplexity": 97.514},
        "local": {"loss": 3.8312, "perplexity": 46.12, "own_loss": 3.663, "own_perplexity": 38.98},
        "federated": {"loss": 3.4374, "perplexity": 31.11},
        "central": {"loss": 3.3907, "perplexity": 29.69},
        "bytes_down_per_round": 526_336,
        "bytes_up_per_round": 3 * 1024**2,
        "tokens_per_s": 23412.7,
        "wall_s": 158.3,
        "quarantined": [{"round": 1, "site": "a", "reason": "norm"}],
    }
    assert results_table(summary).splitlines() == [
        "                                   all held-out rows      each on its own rows",
        "                                   loss   perplexity         loss   perplexity",
        "─" * 78,
        "Before training                   4.580       97.514            –            –",
        "Each site alone                   3.831       46.120        3.663       38.980",
        "Federated                         3.437       31.110            –            –",
        "All data pooled                   3.391       29.690            –            –",
        "─" * 78,
        "Per round, all sites      514 KiB to the sites, 3.0 MiB back",
        "Speed                     23,413 tokens/s",
        "Wall time                 2 min 38 s",
        "Left out                  1 reply",
    ]


def test_terminal_table_leaves_out_what_is_not_known() -> None:
    scores = {"loss": math.nan, "accuracy": 0.8125}
    table = results_table({"metric": "accuracy", "local": None, "federated": scores})
    assert re.search(r"^Federated +– +0\.812$", table, re.MULTILINE)
    assert "alone" not in table and "own rows" not in table and "Left out" not in table
    with pytest.raises(KeyError, match="metric"):
        results_table({})


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["loss", "perplexity", "own_loss", "own_perplexity"]),
        st.floats() | st.none() | st.integers() | st.text(max_size=5),
    ),
    st.floats(min_value=0) | st.none(),
)
def test_terminal_table_fits_80_columns(scores: dict[str, Any], amount: float | None) -> None:
    keys = ("bytes_down_per_round", "bytes_up_per_round", "tokens_per_s")
    bounded = None if amount is None else min(amount, 1e18)
    summary = {"metric": "perplexity", "federated": scores, **dict.fromkeys(keys, bounded)}
    assert max(map(len, results_table(summary).splitlines())) <= 80


def test_numbers_as_people_read_them() -> None:
    assert [score(x) for x in (None, 0.81249, 3.4374, 4321.0, 1e30)] == [
        "–", "0.812", "3.437", "4,321.0", "1.00e+30",
    ]  # fmt: skip
    sizes = (0, 1023, 1024, 526_336, 1024**2 - 1, 52 * 1024**2, 3.5 * 1024**4)
    assert [size(x) for x in sizes] == [
        "0 B", "1023 B", "1.0 KiB", "514 KiB", "1.0 MiB", "52.0 MiB", "3.5 TiB",
    ]  # fmt: skip
    assert [duration(x) for x in (0.04, 9.96, 59.6, 158.3, 3599.7, 7322)] == [
        "0.0 s", "10 s", "1 min 0 s", "2 min 38 s", "1 h 0 min", "2 h 2 min",
    ]  # fmt: skip
    row = {"a": True, "b": "3", "c": math.inf, "d": 10**400, "e": 3, "f": None}
    assert [number(row, key) for key in "abcdefg"] == [None, None, None, None, 3.0, None, None]


@settings(deadline=None)
@given(st.text())
def test_foreign_text_is_harmless(text: str) -> None:
    marks = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not any(unicodedata.category(char) in marks for char in clean(text))
    assert not set(safe(text)) & set("<>\"'")
    assert len(clean(text, 40)) <= 40
    safe(text).encode("utf-8")


@settings(deadline=None)
@given(st.text(), st.integers(2, 30))
def test_fit_keeps_within_its_columns(text: str, width: int) -> None:
    fitted = fit(text, width)
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in fitted)
    assert wide <= width
    if text.isascii() and text.isalnum() and len(text) <= width:
        assert fitted == text


@settings(deadline=None)
@given(st.lists(st.floats(-50, 250), max_size=8))
def test_spread_keeps_order_bounds_and_distance(wanted: list[float]) -> None:
    placed = spread(wanted, 13, 0, 200)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    steps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(step >= 13 - 1e-6 for step in steps)
    assert all(-1e-6 <= place <= 200 + 1e-6 for place in placed)


def test_spread_moves_nothing_that_is_clear_and_shares_what_is_too_little() -> None:
    assert spread([150, 20, 80], 13, 0, 200) == [150, 20, 80]
    assert spread([9, 9, 9], 13, 0, 20) == [0, 10, 20]


@settings(deadline=None)
@given(st.floats(0, 1e14))
def test_byte_ticks_are_few_round_and_within(top: float) -> None:
    ticks = byte_ticks(top)
    assert ticks[0] == 0 and ticks[-1] <= top + 1e-6 and len(ticks) <= 6
    assert len(ticks) >= 2 or top < 1


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK])
@pytest.mark.parametrize("ground", ["page", "paper", "tint"])
def test_text_is_legible_in_both_schemes(palette: dict[str, str], ground: str) -> None:
    """WCAG 2 level AA: a contrast of at least 4.5 for text."""
    texts = ["ink", "soft"] if ground == "tint" else ["ink", "soft", "federated", "alone", "pooled"]
    for name in texts:
        low, high = sorted((_luminance(palette[name]), _luminance(palette[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
