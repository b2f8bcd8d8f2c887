"""Tiny models of every family that can be cut, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

CAUSAL = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "glm", "glm4",
    "phi3", "olmo2",
)  # fmt: skip
ENCODERS = ("bert", "roberta")
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "query_pre_attn_scalar": 8, "initializer_range": 0.3,
}  # fmt: skip
_WITHOUT_HEAD_DIM = ("gpt2", "bert", "roberta", "phi3", "olmo2")


def tiny(family: str, seed: int = 0, **keys: Any) -> PreTrainedModel:
    """A model of 4 blocks in evaluation mode: causal, or a classifier of 3 classes for encoders."""
    sizes = _SIZES | keys
    if family in _WITHOUT_HEAD_DIM:
        sizes.pop("head_dim")
    if family in ENCODERS:
        sizes["num_labels"] = 3
    auto: Any = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(AutoConfig.for_model(family, **sizes))
    return model.eval()


def batch(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Three texts: a whole one, one padded on the right, and for encoders none on the left."""
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if family not in ENCODERS:
        mask[2, :3] = 0
    labels = torch.tensor([0, 2, 1]) if family in ENCODERS else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
