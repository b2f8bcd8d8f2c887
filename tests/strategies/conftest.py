"""Settings of the property tests in this folder, and a strategy over four sites."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from strategies import messages
from tests.fakes import at_the_server
from tests.strategies.federation import Bench

# No time limit per example: on a loaded machine any single one may be slow.
settings.register_profile("strategies", deadline=None)
settings.load_profile("strategies")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be the server, and look for replies often."""
    monkeypatch.setattr(messages, "_POLL_S", 0.001)
    with at_the_server():
        yield


@pytest.fixture
def bench(tmp_path: Path, server: None) -> Bench:
    """A strategy over the sites of a federation, in a folder of its own."""
    return Bench(tmp_path)
