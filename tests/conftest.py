"""Tiny models of three architectures, made on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as algorithms
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXT = ["the cat sat on the mat, the dog ran after the cat", "a bird sang; nobody heard it sing"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real processes first: they take longest, and nobody is to wait for them alone."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, which is fastest and the same everywhere for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred entries, with an end-of-sequence token and padding."""
    tokenizer = Tokenizer(algorithms.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_models(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Mapping[str, Path]:
    """Folders in hub format of `llama`, `gpt2` and `bert`, some 10,000 weights, context 64."""
    size, words = 16, len(tiny_tokenizer)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    llama = LlamaConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        **special,
    )
    gpt2 = GPT2Config(vocab_size=words, n_positions=64, n_embd=size, n_layer=2, n_head=2, **special)
    bert = BertConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models: dict[str, PreTrainedModel] = {
            "llama": LlamaForCausalLM(llama),
            "gpt2": GPT2LMHeadModel(gpt2),
            "bert": BertModel(bert),
        }
    root = tmp_path_factory.mktemp("tiny")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}
