"""Payloads attach, travel, and come back the same; what cannot work is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from models.base import Base
from models.config import PayloadConfig
from models.layout import LayoutError
from models.payload import Payload, attach, prompting

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["lora", "soft-prompt", "prefix", "adapter", "ia3", "loha", "full", "p-tuning"]
IDS = torch.tensor([[1, 40, 77, 102, 9, 250]])

Attach = Callable[..., tuple[Base, Payload]]


@torch.no_grad()
def logits(module: Any, ids: Tensor = IDS) -> Tensor:
    """Logits of the text's own positions, or of the classes."""
    module.eval()
    found: Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found if found.dim() == 2 else found[:, -ids.shape[1] :]


def embeddings(base: Base) -> Tensor:
    weight = base.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def disturb(payload: Payload) -> dict[str, Tensor]:
    """Load other values than those at the start, and return them."""
    generator = torch.Generator().manual_seed(3)
    values = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in payload.select().items()
    }
    payload.load(values)
    return values


def step(payload: Payload, labels: Tensor = IDS) -> None:
    """One step of gradient descent on everything that is trained."""
    payload.module.train()
    payload.module(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels
    ).loss.backward()
    with torch.no_grad():
        for parameter in payload.parameters.values():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_selected_loads_back_exactly(attached: Attach, kind: str) -> None:
    _, payload = attached(kind)
    start = payload.select()
    assert list(start) == list(payload.layout.names) == sorted(start)
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    values = disturb(payload)
    assert same(payload.select(), values)
    assert not same(start, values)  # copies, which loading does not reach
    payload.load(start)
    assert same(payload.select(), start)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_payload_is_trained_and_all_of_it(attached: Attach, kind: str) -> None:
    _, payload = attached(kind)
    mine = {id(parameter) for parameter in payload.parameters.values()}
    before = {
        name: tensor.clone()
        for name, tensor in payload.module.named_parameters()
        if id(tensor) not in mine
    }
    start = payload.select()
    step(payload)
    frozen = {n: t for n, t in payload.module.named_parameters() if id(t) not in mine}
    assert same(before, frozen)
    assert bool(frozen) != (kind == "full")
    assert not any(tensor.requires_grad for tensor in frozen.values())
    assert not same(start, payload.select())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_payload_gives_the_same_logits_elsewhere(
    attached: Attach, tiny_models: Mapping[str, Path], tmp_path: Path, kind: str
) -> None:
    _, payload = attached(kind)
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_models["llama"]))
    disturb(payload)
    expected = logits(payload.module)
    payload.save(tmp_path)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    if kind == "full":
        fresh: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        fresh = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
        fresh = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix", "ia3", "full"])
def test_a_classification_head_travels_and_is_saved(
    attached: Attach, tiny_models: Mapping[str, Path], tmp_path: Path, kind: str
) -> None:
    _, payload = attached(kind, model="bert", task="classification")
    heads = [name for name in payload.layout.names if "classifier" in name]
    assert len(heads) == 2 and {payload.select()[name].shape[0] for name in heads} == {3}
    start = payload.select()
    step(payload, torch.tensor([2]))
    assert not torch.equal(start[heads[1]], payload.select()[heads[1]])
    expected = logits(payload.module)
    payload.save(tmp_path)
    if kind == "full":
        fresh: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    else:
        # Drawn anew by a generator in another state: what is not saved would be another head.
        torch.manual_seed(99)
        fresh = AutoModelForSequenceClassification.from_pretrained(
            tiny_models["bert"], num_labels=3
        )
        fresh = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "kind"), [("llama", "prefix"), ("bert", "soft-prompt")])
def test_class_scores_that_do_not_depend_on_padding(
    attached: Attach, model: str, kind: str
) -> None:
    _, payload = attached(kind, model=model, task="classification")
    assert not any(module.training for module in payload.module.modules())
    mask = torch.tensor([[1] * 6 + [0] * 3])
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        found = payload.module(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(found, logits(payload.module), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["random", "vocabulary", "text"])
def test_soft_prompts_start_as_asked(attached: Attach, init: str) -> None:
    text = "the cat sat on the mat"
    base, payload = attached("soft-prompt", init=init, init_text=text)
    (prompt,) = payload.select().values()
    vocabulary = embeddings(base)
    found = (prompt[:, None] == vocabulary).all(-1).any(-1)
    assert prompt.shape == (4, 16)
    assert found.tolist() == [init != "random"] * 4
    if init == "random":
        assert 0.5 < float(prompt.std() / vocabulary.std()) < 2
    if init == "text":
        ids = base.tokenizer(text)["input_ids"][:4]
        assert torch.equal(prompt, vocabulary[ids])


def test_a_short_hard_prompt_is_repeated(attached: Attach) -> None:
    base, payload = attached("soft-prompt", init="text", init_text=" cat", num_virtual_tokens=5)
    (prompt,) = payload.select().values()
    ids = (base.tokenizer(" cat")["input_ids"] * 5)[:5]
    assert torch.equal(prompt, embeddings(base)[ids])


def test_a_hard_prompt_leaves_no_path_in_the_saved_config(attached: Attach, tmp_path: Path) -> None:
    _, payload = attached("soft-prompt", init="text", init_text="the cat")
    payload.save(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["tokenizer_name_or_path"] is None


def test_prompts_do_not_drown_the_text(attached: Attach) -> None:
    base, payload = attached("prefix")
    spread = embeddings(base).std()
    (prompt,) = payload.select().values()
    assert 0.5 < float(prompt.std() / spread) < 2


def test_lora_starts_as_the_base_model_and_scales_as_configured(
    attached: Attach, tiny_models: Mapping[str, Path]
) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny_models["llama"]))
    _, payload = attached("lora", rank=3, alpha=6.0, target_modules="v_proj, o_proj")
    assert torch.equal(logits(payload.module), plain)
    values = payload.select()
    assert {name.split(".")[-3] for name in values} == {"v_proj", "o_proj"}
    for name, tensor in values.items():
        if "lora_B" in name:
            assert tensor.shape[1] == 3 and not tensor.any()
        else:
            assert tensor.shape[0] == 3 and tensor.any()
    disturb(payload)
    merged: Any = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    values = payload.select()
    with torch.no_grad():
        for name in [name for name in values if "lora_A" in name]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = values[name.replace("lora_A", "lora_B")]
            merged.get_submodule(path).weight += (6.0 / 3) * (b @ values[name])
    torch.testing.assert_close(logits(payload.module), logits(merged), rtol=1e-4, atol=1e-4)


def test_all_linear_layers_can_be_adapted(attached: Attach) -> None:
    _, payload = attached("lora", target_modules="all-linear")
    adapted = {name.split(".")[-3] for name in payload.layout.names}
    assert adapted == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix", "loha", "p-tuning"])
def test_the_start_depends_on_the_seed_alone(attached: Attach, kind: str) -> None:
    torch.manual_seed(1)
    one = attached(kind, seed=1)[1].select()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = attached(kind, seed=1)[1].select()
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, again)
    assert not same(one, attached(kind, seed=2)[1].select())


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_stable_and_say_nothing_of_wrappers(attached: Attach, kind: str) -> None:
    task = "classification" if kind in ("lora", "prefix") else "causal-lm"
    one, other = (attached(kind, task=task, seed=seed)[1].layout for seed in (1, 2))
    assert one == other and one.digest == other.digest
    parts = {part for name in one.names for part in name.split(".")}
    assert not parts & {"default", "modules_to_save", "original_module"}
    assert one.size == sum(p.numel() for p in attached(kind, task=task)[1].parameters.values())


def test_layouts_tell_sizes_and_kinds_apart(attached: Attach) -> None:
    digests = [
        attached("lora", rank=2)[1].layout.digest,
        attached("lora", rank=3)[1].layout.digest,
        attached("soft-prompt")[1].layout.digest,
        attached("prefix")[1].layout.digest,
        attached("full")[1].layout.digest,
    ]
    assert len(set(digests)) == len(digests)


def test_tied_weights_travel_once(attached: Attach) -> None:
    base, payload = attached("full", model="gpt2")
    model: Any = base.model
    assert "lm_head.weight" not in payload.layout.names
    disturb(payload)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_wrong_layout_is_refused_and_changes_nothing(attached: Attach) -> None:
    _, payload = attached("lora")
    start = payload.select()
    last = list(start)[-1]
    shifted = {name: tensor + 1 for name, tensor in start.items()}
    wrong: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": ({n: t for n, t in shifted.items() if n != last}, f"'{last}', which is missing"),
        "extra": (shifted | {"more": torch.zeros(1)}, "got 'more' too"),
        "order": (dict(reversed(shifted.items())), "order of tensors"),
        "shape": (shifted | {last: torch.zeros(1)}, r"of shape \(.*\), got \(1,\)"),
        "dtype": (shifted | {last: shifted[last].double()}, "as float32, got torch.float64"),
    }
    for tensors, message in wrong.values():
        with pytest.raises(LayoutError, match=message):
            payload.load(tensors)
        assert same(payload.select(), start)


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix", "ia3", "loha", "p-tuning"])
def test_a_bfloat16_base_keeps_the_payload_in_float32(attached: Attach, kind: str) -> None:
    base, payload = attached(kind, dtype="bfloat16")
    assert {p.dtype for p in payload.parameters.values()} == {torch.float32}
    assert embeddings(base).dtype == torch.bfloat16
    small = {name: tensor + 1e-4 * (tensor + 1) for name, tensor in payload.select().items()}
    payload.load(small)
    assert same(payload.select(), small)
    step(payload)
    assert all(p.dtype == torch.float32 for p in payload.parameters.values())


@pytest.mark.parametrize(("model", "kind"), [("llama", "lora"), ("bert", "soft-prompt")])
def test_a_new_head_on_a_bfloat16_base_is_float32_too(
    attached: Attach, model: str, kind: str
) -> None:
    _, payload = attached(kind, model=model, task="classification", dtype="bfloat16")
    assert {p.dtype for p in payload.parameters.values()} == {torch.float32}
    start = payload.select()
    step(payload, torch.tensor([1]))
    assert not same(start, payload.select())


def test_options_reach_the_method(attached: Attach) -> None:
    _, payload = attached("lora", options='{"use_dora": true}')
    assert any("magnitude" in name for name in payload.layout.names)


def test_virtual_tokens_are_counted(attached: Attach) -> None:
    counts = {kind: attached(kind)[1].virtual_tokens for kind in KINDS}
    assert counts == {
        "lora": 0, "adapter": 0, "ia3": 0, "loha": 0, "full": 0,
        "soft-prompt": 4, "prefix": 4, "p-tuning": 4,
    }  # fmt: skip
    assert attached("prefix", options='{"num_virtual_tokens": 7}')[1].virtual_tokens == 7
    assert {kind for kind in KINDS if prompting(kind)} == {
        "soft-prompt", "prefix", "p-tuning", "adapter",
    }  # fmt: skip


def test_attach_serves_any_model_in_memory(
    tiny_models: Mapping[str, Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"])
    payload = attach(model, PayloadConfig(kind="lora", rank=2), tokenizer=tiny_tokenizer)
    assert payload.layout.size == sum(t.numel() for t in payload.select().values()) > 0
    assert payload.device == torch.device("cpu")
