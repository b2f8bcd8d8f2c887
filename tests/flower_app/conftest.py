"""Sites in one process, for the tests of the ClientApp and its worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flower_app import run as server
from tests.flower_app.nodes import Nodes
from tests.flower_app.runs import Shared


@pytest.fixture
def reports() -> None:
    """Whole runs write their page, as outside of tests."""


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than these runs; a test that reads the page asks for `reports`."""
    if "reports" not in request.fixturenames:
        monkeypatch.setattr(server, "write_report", lambda folder: folder)


@pytest.fixture
def nodes(
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> Nodes:
    """Three sites with rows of their own on the tiny Llama."""
    return Nodes(tmp_path, tiny_models["llama"], monkeypatch)


@pytest.fixture(scope="module")
def shared(
    tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    """Whole runs of such sites, for several tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        yield Shared(Nodes(tmp_path_factory.mktemp("shared"), tiny_models["llama"], patch))
