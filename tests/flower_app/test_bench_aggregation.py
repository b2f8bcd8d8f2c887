"""The aggregation benchmark: what it prints of what it measured, and of what it had to skip."""

from __future__ import annotations

from typing import Any

from flower_app.bench.aggregation import _text
from flower_app.bench.sides import BYZFL, COPY, FLWR, has
from strategies.registry import RULES

CELL = {"sites": 8, "size": 1000, "byzantine": 1}


def record(rule: str, side: str, best_s: float) -> dict[str, Any]:
    return {
        **CELL, "rule": rule, "side": side, "seconds": [best_s], "best_s": best_s, "grown": 2**20,
    }  # fmt: skip


def test_ratios_are_against_the_faster_of_theirs_and_gaps_have_reasons() -> None:
    text = _text(
        [
            record(COPY, "ours", 0.001),
            record("mean", "ours", 0.002),
            {**CELL, "rule": "mean", "side": "flwr", "skipped": "took over 90 s"},
            record("mean", "byzfl numpy", 0.008),
            record("mean", "byzfl torch", 0.005),
        ]
    )
    row = next(line for line in text.splitlines() if " mean " in line)
    assert row.split() == ["8", "1,000", "mean", "2.0", "-", "2.50", "1", "-", "1"]
    assert "0.50 of a copy's" in text
    assert "8 sites, 1,000 numbers, mean, flwr: took over 90 s." in text


def test_what_is_compared_exists() -> None:
    assert set(FLWR) | set(BYZFL) <= set(RULES)
    assert has("ours", COPY) and not has("flwr", COPY) and not has("byzfl numpy", "bulyan")
