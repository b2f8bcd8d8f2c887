"""Parts trained in full join with the others into one PEFT adapter for the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from models.config import PayloadConfig
from models.section import ConfigError
from models.split.adapter import added, factors, join, load_factors
from models.split.cut import Parts
from models.split.full import train
from models.split.generate import load_for_text
from models.split.load import SERVER, SITE, Cuts, load_split
from tests.models.split.families import ENCODERS, batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = PayloadConfig(rank=3, alpha=6.0)


def logits(parts: Any, family: str) -> Any:
    given = batch(family)
    mask = given["attention_mask"]
    return parts.tail(parts.middle(parts.head(given["input_ids"], mask), mask), mask)


def trained(folder: Path, cuts: Cuts, whats: tuple[str, str, str]) -> tuple[Parts, Any]:
    """All three parts, moved away from their start where they are trained."""
    parts, settings = load_split(folder, (*SITE, *SERVER), cuts, payload=LORA)
    assert settings is not None
    settings = train(parts, settings, whats)
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        new = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in factors(part).items()
        }
        load_factors(part, new)
    return parts, settings


@pytest.mark.parametrize(
    ("family", "tied", "whats"),
    [
        ("llama", True, ("full", "full", "full")),
        ("llama", False, ("lora", "full", "none")),
        ("gpt2", True, ("full", "lora", "lora")),
        ("gpt2", True, ("none", "none", "full")),
        ("bert", False, ("full", "none", "full")),
        ("roberta", False, ("none", "lora", "full")),
    ],
)
def test_they_join_into_one_adapter(
    family: str, tied: bool, whats: tuple[str, str, str], tmp_path: Path
) -> None:
    whole = tiny(family, **({} if family in ENCODERS else {"tie_word_embeddings": tied}))
    before = whole(**batch(family)).logits
    whole.save_pretrained(tmp_path / "model")
    encoder = family in ENCODERS
    cuts = Cuts(1, 1, "classification", 3) if encoder else Cuts(1, 1)
    parts, settings = trained(tmp_path / "model", cuts, whats)
    expected = logits(parts, family)
    assert (expected - before).abs().max() > 0.1
    tensors = {name: t for part in parts for name, t in added(part).items()}
    join(tensors, settings, tmp_path / "adapter")
    joined = PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    torch.testing.assert_close(joined(**batch(family)).logits, expected)
    if encoder:
        return
    site, mine = load_for_text(tmp_path / "model", SITE, cuts, tmp_path / "adapter")
    server, its = load_for_text(tmp_path / "model", SERVER, cuts, tmp_path / "adapter")
    again = Parts(*({**site, **server}[name] for name in ("head", "middle", "tail")))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(again, family), expected)
    assert mine == its


def test_a_tied_embedding_stays_one_tensor(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    for whats in (("full", "lora", "none"), ("none", "lora", "full")):
        parts, _ = trained(tmp_path, Cuts(1, 1), whats)
        tied = parts.head.model.wte.weight
        assert tied is parts.tail.model.lm_head.weight and tied.requires_grad
        blocks = [parts.head.model.h, parts.tail.model.transformer.h]
        frozen = blocks[1 if whats[0] == "full" else 0]
        assert not any(p.requires_grad for p in frozen.parameters())


def test_modules_kept_out_of_lora_already_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    payload = LORA.model_copy(update={"options": '{"exclude_modules": ["q_proj"]}'})
    parts, settings = load_split(tmp_path, SITE, Cuts(1, 1), payload=payload)
    assert settings is not None
    with pytest.raises(
        ConfigError, match=r"Expected no exclude_modules in payload.options .*q_proj"
    ):
        train(parts, settings, ("full", "lora", "lora"))
