"""The command that cuts a model for the two sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flower_app.parts import main
from models.split.load import SERVER, SITE, Cuts, digest_of_parts, load_parts
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def whole(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Path:
    """A model of four blocks with a tokenizer."""
    folder = tmp_path / "whole"
    tiny("llama", vocab_size=512).save_pretrained(folder)
    for path in tiny_models["llama"].glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_is_cut(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    assert main(["cut", str(whole), "--out", str(out), "--tail-blocks", "2"]) == 0
    assert digest_of_parts(whole, Cuts(1, 2)) in capsys.readouterr().out
    assert (out / "site" / "tokenizer.json").exists()
    assert not (out / "server" / "tokenizer.json").exists()
    assert set(load_parts(out / "site", SITE, Cuts(1, 2))) == {"head", "tail"}
    assert set(load_parts(out / "server", SERVER, Cuts(1, 2))) == {"middle"}


def test_what_cannot_be_cut_exits_with_2(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cut", str(whole), "--out", str(tmp_path), "--head-blocks", "4"]) == 2
    assert "at least one block in each part of a model of 4" in capsys.readouterr().err
    assert main(["cut", str(tmp_path / "gone"), "--out", str(tmp_path)]) == 2
    assert "Expected a model folder with a config.json" in capsys.readouterr().err
