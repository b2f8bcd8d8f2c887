"""A soft prompt in the head is PEFT's prompt tuning of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel

from models.config import ModelConfig, PayloadConfig
from models.split.base import attach, load
from models.split.config import SplitConfig
from models.split.load import SERVER, SITE
from models.split.schedule import sequential
from tests.models.split.families import batch, tiny
from tests.models.split.sites import linked, settings

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = PayloadConfig(num_virtual_tokens=5)
SPLIT = SplitConfig(head="soft-prompt", middle="none", tail="none")
NAME = "prompt_encoder.embedding.weight"


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Any) -> Any:
    """A tiny model, saved below `tmp_path`."""
    whole = tiny(request.param, vocab_size=len(tiny_tokenizer))
    whole.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return whole


def test_it_computes_what_peft_computes_of_the_whole(model: Any, tmp_path: Path) -> None:
    named = ModelConfig(name=str(tmp_path / "model"))
    base = load(named, PROMPT, SPLIT, SITE, seed=1)
    site = attach(base, "")
    assert list(site.parameters) == list(site.shared) == [NAME] and site.virtual_tokens == 5
    middle = load(named, PROMPT, SPLIT, SERVER).middle
    round_ = sequential([middle], ["ann"], settings(trains="none"))
    site.module.link = linked(round_, "ann")
    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    site.load({NAME: prompt})
    site.save(tmp_path / "adapter")

    given = batch(model.config.model_type)
    whole: Any = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert isinstance(whole.active_peft_config, peft.PromptTuningConfig)
    expected, found = whole(**given), site.module(**given)
    there = torch.cat([torch.ones(3, 5), given["attention_mask"]], dim=1).bool()
    torch.testing.assert_close(found.logits[there], expected.logits[there])
    torch.testing.assert_close(found.loss, expected.loss)
    assert (whole.get_base_model()(**given).loss - expected.loss).abs() > 0.01
    round_.finish()


def test_both_sides_start_it_the_same(model: Any, tmp_path: Path) -> None:
    named = ModelConfig(name=str(tmp_path / "model"))

    def start(payload: PayloadConfig, wanted: Any, seed: int = 1) -> torch.Tensor:
        return attach(load(named, payload, SPLIT, wanted, seed=seed), "").select()[NAME]

    drawn = start(PROMPT, SERVER)
    assert torch.equal(drawn, start(PROMPT, SITE))
    assert not torch.equal(drawn, start(PROMPT, SERVER, seed=2))
    assert 0.5 < float(drawn.std()) / model.config.initializer_range < 1.5
    vocabulary = model.get_input_embeddings().weight
    for init in ({"init": "vocabulary"}, {"init": "text", "init_text": "a cat"}):
        payload = PROMPT.model_copy(update=init)
        rows = start(payload, SERVER)
        assert torch.equal(rows, start(payload, SITE))
        assert all(bool((vocabulary == row).all(dim=1).any()) for row in rows)
