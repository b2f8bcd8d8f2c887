"""The self-check lets through what can be cut, and nothing that computes something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.section import ConfigError
from models.split import parity
from models.split.cut import Middle
from tests.models.split.families import CAUSAL, ENCODERS, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_every_known_family_passes(family: str, tmp_path: Path) -> None:
    tiny(family).config.save_pretrained(tmp_path)
    task = "classification" if family in ENCODERS else "causal-lm"
    before = torch.get_rng_state()
    parity.check_parity(tmp_path, task)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spoilt", [1e-3, float("nan")])
def test_parts_that_compute_something_else_are_refused(
    spoilt: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    forward = Middle.forward

    def wrong(self: Middle, hidden: Tensor, *args: Any, **rest: Any) -> Any:
        return forward(self, hidden, *args, **rest) * (1 + spoilt)

    monkeypatch.setattr(Middle, "forward", wrong)
    with pytest.raises(ConfigError, match=r"'llama' to compute the same in parts .* difference of"):
        parity.check_parity(tmp_path, "causal-lm")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Expected an encoder for split classification"):
        parity.check_parity(tmp_path, "classification")
