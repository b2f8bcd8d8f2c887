"""The oracle is loaded without the package around it and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from flower_app.bench import byzfl_loader
from tests.strategies.byzfl_oracle import aggregators, oracle

ROWS = torch.tensor([[1.0, 9.0], [2.0, 5.0], [3.0, -100.0], [60.0, 6.0]])


def test_it_aggregates() -> None:
    assert oracle("Median", ROWS).tolist() == [2.5, 5.5]
    assert oracle("TrMean", ROWS, f=1).tolist() == [2.5, 5.5]
    assert oracle("NNM", ROWS, f=1).shape == (4, 2)


def test_nothing_is_left_in_sys_modules() -> None:
    aggregators()
    assert not [name for name in sys.modules if name.split(".")[0] == "byzfl"]


def test_where_it_is_missing_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(byzfl_loader.ByzflMissing, match="scripts/setup dev"):
        byzfl_loader.load_byzfl()
