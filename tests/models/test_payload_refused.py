"""Payloads that would fail, or compute wrongly in silence, are refused with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertLMHeadModel,
)

from models.base import Base, load
from models.config import ModelConfig, PayloadConfig
from models.payload import Payload, attach, kinds
from models.section import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

Attach = Callable[..., tuple[Base, Payload]]


def test_a_method_that_cannot_carry_the_new_head_is_refused(attached: Attach) -> None:
    with pytest.raises(
        ConfigError, match=r"'adapter' to train the new module 'score'.*pick 'lora'"
    ):
        attached("adapter", task="classification")


@pytest.mark.parametrize("kind", ["soft-prompt", "p-tuning"])
def test_class_scores_that_depend_on_padding_are_refused(attached: Attach, kind: str) -> None:
    """A causal model reads the class off the last position when it is given embeddings."""
    with pytest.raises(ConfigError, match=rf"'{kind}' .* with and without padding.*pick 'lora'"):
        attached(kind, task="classification")


def test_an_encoder_is_no_causal_model(tiny_models: Mapping[str, Path]) -> None:
    model = BertLMHeadModel.from_pretrained(tiny_models["bert"])
    with pytest.raises(ConfigError, match=r"causal model, got one \(bert\) that sees the tokens"):
        attach(model, PayloadConfig(kind="lora"))


def test_a_hard_prompt_without_words_or_tokenizer_is_refused(
    attached: Attach, tiny_models: Mapping[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"payload\.init-text with words in it, got ''; write"):
        attached("soft-prompt", init="text")
    base = load(ModelConfig(name=str(tiny_models["llama"])))
    wanted = PayloadConfig(kind="soft-prompt", init="text", init_text="the cat")
    with pytest.raises(ConfigError, match=r"a tokenizer with payload\.init='text', got none"):
        attach(base.model, wanted)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_training_in_bfloat16_is_refused(attached: Attach, kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"trained in float32, got .*; set model\.dtype='float32'"
    ):
        attached(kind, dtype="bfloat16")


def test_unknown_kinds_list_the_choices(attached: Attach) -> None:
    with pytest.raises(
        ConfigError, match=r"Unknown payload\.kind 'lorra'.* 'lora'\?.*Choices: .*ia3"
    ):
        attached("lorra")
    assert {"full", "lora", "soft-prompt", "prefix", "adapter", "ia3", "p-tuning"} <= {*kinds()}
    assert len(kinds()) == len({*kinds()})


def test_unknown_options_list_the_choices(attached: Attach) -> None:
    message = r"Unknown payload\.options entry for lora 'use_dorra'.* 'use_dora'\?.*Choices: .*bias"
    with pytest.raises(ConfigError, match=message):
        attached("lora", options='{"use_dorra": true}')


@pytest.mark.parametrize("options", ["{", "[1]", "3", "use_dora"])
def test_options_that_are_no_object_are_refused(attached: Attach, options: str) -> None:
    with pytest.raises(ConfigError, match=r"payload\.options as a JSON object such as .*, got"):
        attached("lora", options=options)


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"target_modules": "no_such_layer"}, "no_such_layer.*not found.*target-modules"),
    ("lora", {"options": '{"r": 0}'}, "positive integer.*payload.options"),
    ("lora", {"options": '{"r": "many"}'}, "to fit a LlamaForCausalLM"),
    ("loha", {"model": "gpt2"}, "to fit a GPT2LMHeadModel.*Conv1D"),
    ("multitask-prompt-tuning", {}, "to compute with this model, but it fails: task_ids"),
    ("trainable-tokens", {}, "to compute with this model, but it fails"),
]


@pytest.mark.parametrize(("kind", "keys", "message"), UNFIT)
def test_what_does_not_fit_the_architecture_is_refused(
    attached: Attach, kind: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"Expected payload\.kind='{kind}' .*{message}"):
        attached(kind, **keys)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank\n.*greater than or equal to 1"):
        PayloadConfig(rank=rank)
