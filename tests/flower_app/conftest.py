"""Sites in one process, for the tests of the ClientApp and its worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.flower_app.nodes import Nodes


@pytest.fixture
def nodes(
    tiny_models: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> Nodes:
    """Three sites with rows of their own on the tiny Llama."""
    return Nodes(tmp_path, tiny_models["llama"], monkeypatch)
