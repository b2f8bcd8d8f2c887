"""LoRA in the parts is LoRA in the whole, and joins into one adapter for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from models.config import PayloadConfig
from models.payload import Payload, attach
from models.section import ConfigError
from models.split.adapter import adapt, factors, join, load_factors, train_only
from models.split.cut import Part
from models.split.load import SERVER, SITE, Cuts, PartName, empty, load_parts
from tests.models.split.families import ENCODERS, batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = PayloadConfig(rank=3, alpha=6.0)


def cuts_of(family: str) -> Cuts:
    return Cuts(1, 1, "classification", 3) if family in ENCODERS else Cuts(1, 1)


def parts_of(family: str, folder: Path, seed: int = 0) -> dict[PartName, Part]:
    cuts = cuts_of(family)
    site = load_parts(folder, SITE, cuts, seed=seed, payload=LORA)
    return site | load_parts(folder, SERVER, cuts, seed=seed, payload=LORA)


def logits(parts: dict[PartName, Part], family: str) -> Any:
    given = batch(family)
    mask = given["attention_mask"]
    hidden = parts["middle"](parts["head"](given["input_ids"], mask), mask)
    return parts["tail"](hidden, mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "glm4", "bert"])
def test_parts_join_into_one_adapter(family: str, tmp_path: Path) -> None:
    whole = tiny(family, tie_word_embeddings=family == "gpt2")
    whole.save_pretrained(tmp_path / "model")
    parts = parts_of(family, tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    trained = {}
    for part in parts.values():
        train_only(part, "lora")
        new = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in factors(part).items()
        }
        load_factors(part, new)
        trained |= new
    assert torch.allclose(logits(parts, family), whole(**batch(family)).logits) is False
    model, _ = empty(tmp_path / "model", cuts_of(family))
    join(trained, adapt(model, LORA, cuts_of(family).task), tmp_path / "adapter")
    joined = PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    torch.testing.assert_close(joined(**batch(family)).logits, logits(parts, family))
    assert len(trained) == sum(p.numel() > 0 for n, p in joined.named_parameters() if _own(n))


def _own(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_trained_is_precise_in_a_model_of_low_precision(
    family: str, new: bool, tmp_path: Path
) -> None:
    whole = tiny(family)
    (whole.base_model if new else whole).save_pretrained(tmp_path)
    cuts = cuts_of(family)
    parts = load_parts(tmp_path, (*SITE, *SERVER), cuts, dtype=torch.bfloat16, payload=LORA, seed=1)
    for part in parts.values():
        train_only(part, "lora")
        assert {p.dtype for p in part.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in part.parameters() if not p.requires_grad} == {torch.bfloat16}
    found = logits(parts, family)
    found.sum().backward()
    head = {n: p for n, p in parts["tail"].named_parameters() if ".modules_to_save." in n}
    assert found.dtype == torch.float32 and head and all(p.grad.any() for p in head.values())
    # As the whole model under PEFT has it, whose new head is another one.
    payload = attach(
        whole.to(torch.bfloat16), LORA, task=cuts.task, fresh_modules=["classifier"], seed=1
    )
    payload.load({**payload.select(), **{n: t for p in parts.values() for n, t in _by(p, payload)}})
    assert torch.equal(payload.module(**batch(family)).logits, found)


def _by(part: Part, payload: Payload) -> list[tuple[str, torch.Tensor]]:
    """What a part trains by the names of the whole payload."""
    whole = {name.removeprefix("base_model.model."): name for name in payload.parameters}
    return [(whole[name], tensor) for name, tensor in factors(part).items()]


def test_factors_start_from_the_seed_and_their_place_alone(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    before, alone, other = (parts_of("llama", tmp_path, seed=seed) for seed in (1, 1, 2))
    middle = load_parts(tmp_path, SERVER, Cuts(1, 1), seed=1, payload=LORA)["middle"]
    for part in (*before.values(), *alone.values(), *other.values(), middle):
        train_only(part, "lora")
    first, second = factors(before["middle"]), factors(middle)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = factors(other["middle"])
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert all(bool(t.any()) == ("lora_A" in name) for name, t in first.items())


def test_what_is_trained_is_chosen_per_part(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    parts = parts_of("bert", tmp_path)
    train_only(parts["head"], "none")
    train_only(parts["middle"], "full")
    train_only(parts["tail"], "lora")
    assert factors(parts["head"]) == {}
    assert not any("lora" in name for name in factors(parts["middle"]))
    tail = factors(parts["tail"])
    assert {"classifier.weight", "classifier.bias"} <= set(tail)
    assert all("lora_" in name or name.startswith("classifier.") for name in tail)


def test_other_payloads_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    for payload, message in (
        (PayloadConfig(kind="prefix"), "payload.kind='lora' in the parts .* got 'prefix'"),
        (PayloadConfig(target_modules="nowhere"), "LoRA to fit a LlamaForCausalLM.*nowhere"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_parts(tmp_path, SITE, Cuts(1, 1), payload=payload)
