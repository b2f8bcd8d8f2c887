"""Sites in one process, on a model that has enough blocks to be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.flower_app.nodes import Nodes
from tests.models.split.families import tiny


@pytest.fixture
def family() -> str:
    """Architecture of the sites' model."""
    return "llama"


@pytest.fixture
def nodes(
    family: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> Nodes:
    """Three sites on a tiny model of four blocks."""
    folder = tmp_path / "model"
    tiny(family, vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return Nodes(tmp_path, folder, monkeypatch)
