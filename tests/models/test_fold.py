"""The fold at a site: what the model computes, how it trains, what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models import fold
from models.layout import LayoutError
from models.payload import Payload
from models.train import autocast
from strategies import aggregate
from tests.models.conftest import Attach

Q = "base_model.model.model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[5, 9, 2, 77, 31, 8]])


pytestmark = pytest.mark.usefixtures("one_thread")


def logits(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        found: Tensor = module(input_ids=IDS).logits
    return found


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def aggregated(payload: Payload, rule: str, rounds: int = 1, sites: int = 2) -> dict[str, Tensor]:
    """What some rounds of random updates make of a payload."""
    state = payload.select()
    for round_ in range(rounds):
        generator = torch.Generator().manual_seed(round_)
        deltas = [
            {n: 0.2 * torch.randn(s, generator=generator) for n, s in _shapes(payload)}
            for _ in range(sites)
        ]
        state = aggregate(rule, state, deltas, [1, 2, 3][:sites], seed=round_)
    return state


def _shapes(payload: Payload) -> Iterator[tuple[str, tuple[int, ...]]]:
    return zip(payload.layout.names, payload.layout.shapes, strict=True)


@torch.no_grad()
def merged(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add a fold to the frozen weights themselves, densely."""
    for name in tensors:
        at, _, part = name.partition(".lora_fold")
        if part not in ("_A.weight", ".weight"):
            continue
        if part == ".weight":
            change = tensors[name]
        else:
            change = tensors[f"{at}.lora_fold_B.weight"] @ tensors[name]
        layer = module.get_submodule(at)
        weight = layer.get_base_layer().weight
        turned = weight.shape != change.shape or type(layer.get_base_layer()).__name__ == "Conv1D"
        weight.add_((change.T if turned else change) * layer.scaling["default"])


SHAPES = [
    ("llama", {"rank": 2}),
    ("llama", {"rank": 3, "target_modules": "embed_tokens,down_proj"}),
    ("gpt2", {"rank": 2, "target_modules": "c_attn,c_proj"}),
]


@pytest.mark.parametrize("rule", ["lora-exact", "lora-stack"])
@pytest.mark.parametrize("rounds", [1, 4])  # factors, and matrices
@pytest.mark.parametrize(("model", "keys"), SHAPES)
def test_logits_are_those_of_weights_merged_densely(
    attached: Attach, rule: str, rounds: int, model: str, keys: dict[str, Any]
) -> None:
    _, payload = attached("lora", model=model, **keys)
    tensors = aggregated(payload, rule, rounds)
    fold.load(payload, tensors)
    found = logits(payload.module)
    _, other = attached("lora", model=model, **keys)
    other.load({name: tensors[name] for name in other.layout.names})
    plain = logits(other.module)
    merged(other.module, tensors)
    wanted = logits(other.module)
    assert far(found, wanted) <= 2e-5 * float(wanted.abs().max())
    assert far(found, plain) > 0.01  # the fold does matter


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_merged_weights(attached: Attach, checkpointing: bool) -> None:
    grads = []
    for by_hand in (False, True):
        base, payload = attached("lora", rank=2)
        if checkpointing:
            base.model.gradient_checkpointing_enable()
            base.model.enable_input_require_grads()
        tensors = aggregated(payload, "lora-exact")
        fold.load(payload, tensors)
        if by_hand:
            fold.replace(payload, {})
            merged(payload.module, tensors)
        payload.module.train()
        payload.module(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(
            {name: p.grad.clone() for name, p in payload.parameters.items() if p.grad is not None}
        )
    assert len(grads[0]) == len(grads[1]) > 0
    for name, grad in grads[0].items():
        assert far(grad, grads[1][name]) <= 1e-4 * float(grads[1][name].abs().max()) + 1e-7


def test_a_fold_is_replaced_and_removed(attached: Attach) -> None:
    _, payload = attached("lora", rank=2)
    bare = logits(payload.module)
    first, second = (aggregated(payload, rule) for rule in ("lora-exact", "lora-stack"))
    parts = [{n: t for n, t in both.items() if "lora_fold" in n} for both in (first, second)]
    fold.replace(payload, parts[0])
    once = logits(payload.module)
    fold.replace(payload, parts[1])
    fold.replace(payload, parts[0])
    assert torch.equal(logits(payload.module), once) and not torch.equal(once, bare)
    fold.replace(payload, {})
    assert torch.equal(logits(payload.module), bare)


A, B, WHOLE = (f"{Q}.lora_fold{part}.weight" for part in ("_A", "_B", ""))
WRONG = [
    ({"nowhere.lora_fold.weight": torch.ones(2, 2)}, r"LoRA adapts at this site.*'nowhere'"),
    ({WHOLE: torch.ones(16, 15)}, r"16 inputs and 16 outputs.*\[\(16, 15\)\]"),
    ({A: torch.ones(2, 16)}, r"one matrix, got \[\(2, 16\)\]"),
    ({A: torch.ones(2, 16), B: torch.ones(16, 3)}, r"\(16, 3\)"),
    ({WHOLE: torch.ones(16, 16).half()}, r"float16"),
    ({WHOLE: torch.ones(16, 16), A: torch.ones(2, 16)}, r"factors or a matrix.*lora_fold_A"),
    ({"w": torch.ones(2, 2)}, r"factors of a change of frozen weights, got 'w'"),
]


@pytest.mark.parametrize(("tensors", "reason"), WRONG)
def test_a_fold_that_does_not_fit_is_refused_and_changes_nothing(
    attached: Attach, tensors: dict[str, Tensor], reason: str
) -> None:
    _, payload = attached("lora", rank=2)
    fold.load(payload, aggregated(payload, "lora-exact"))
    before = logits(payload.module)
    with pytest.raises(LayoutError, match=reason):
        fold.replace(payload, tensors)
    assert torch.equal(logits(payload.module), before)


def test_dora_has_no_fold(attached: Attach) -> None:
    _, payload = attached("lora", rank=2, options='{"use_dora": true}')
    with pytest.raises(LayoutError, match=r"got DoRA.*use_dora"):
        fold.replace(payload, {f"{Q}.lora_fold.weight": torch.ones(16, 16)})


SAVED = [("lora-mean", 1), ("lora-svd", 1)]
SAVED += [(rule, rounds) for rule in ("lora-exact", "lora-stack") for rounds in (1, 3)]


@pytest.mark.parametrize(("rule", "rounds"), SAVED)
@pytest.mark.parametrize(
    ("model", "keys"), [*SHAPES, ("llama", {"rank": 2, "options": '{"use_rslora": true}'})]
)
def test_the_saved_adapter_is_the_whole_global_model(
    attached: Attach, tiny_models: Mapping[str, Path], tmp_path: Path, rule: str, rounds: int,
    model: str, keys: dict[str, Any],
) -> None:  # fmt: skip
    _, payload = attached("lora", model=model, **keys)
    fold.load(payload, aggregated(payload, rule, rounds, sites=3))
    payload.save(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_models[model])
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    wanted = logits(payload.module)
    assert far(logits(loaded), wanted) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_new_head_is_saved_beside_a_fold(
    attached: Attach, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    _, payload = attached("lora", model="bert", task="classification", rank=2)
    fold.load(payload, aggregated(payload, "lora-exact", rounds=2))
    payload.save(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_models["bert"], num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    wanted = logits(payload.module)
    assert far(logits(loaded), wanted) <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_low_precision_computes_the_fold_too(attached: Attach, dtype: str, precision: str) -> None:
    found = []
    for kept, computed in ((dtype, precision), ("float32", "float32")):
        _, payload = attached("lora", rank=2, dtype=kept)
        fold.load(payload, aggregated(payload, "lora-exact"))
        with autocast(computed, payload.device):
            found.append(logits(payload.module).float())
    assert 0 < far(*found) < 0.1 * float(found[1].abs().max())
