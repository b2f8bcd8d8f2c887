"""The self-check before a run: does this architecture compute the same in parts as in one piece?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from models.base import seeded
from models.section import ConfigError
from models.split.cut import cut

# Sizes of the model that is checked in place of the real one; families name them differently.
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "n_inner": 48,
    "num_attention_heads": 4, "n_head": 4, "head_dim": 8, "max_position_embeddings": 64,
    "n_positions": 64, "query_pre_attn_scalar": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "sliding_window": 4,
}  # fmt: skip
_TOLERANCE = 1e-5


def check_parity(folder: Path, task: str) -> None:
    """Cut a small model of the folder's architecture, with random weights, and compare.

    Logits and gradients of a padded batch must be those of the model in one piece. Raises
    ConfigError where they are not, or where the architecture cannot be built small.
    """
    shape = AutoConfig.from_pretrained(folder)
    name = str(shape.model_type)
    try:
        with seeded(0):
            whole = _small(shape, task)
            parts = cut(copy.deepcopy(whole))
            off = _furthest(whole, parts)
    except ConfigError:
        raise
    except Exception as error:  # an architecture fails in whatever way its own code does
        raise ConfigError(
            f"Expected to cut a small model of architecture {name!r} before the run, but: {error!r}"
            "; pick another architecture, or train another payload.kind."
        ) from error
    if not off <= _TOLERANCE:
        raise ConfigError(
            f"Expected a model of architecture {name!r} to compute the same in parts as in one "
            f"piece, got a difference of {off:.2g}; pick another architecture, or train another "
            "payload.kind."
        )


def _small(shape: Any, task: str) -> Any:
    """A model of four blocks in evaluation mode."""
    config = copy.deepcopy(shape)
    grouped = getattr(config, "num_key_value_heads", None)
    for key, size in _SIZES.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, size)
    if grouped is not None:
        config.num_key_value_heads = 4 if grouped == shape.num_attention_heads else 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = (list(config.layer_types) * 4)[:4]
    config.num_hidden_layers = 4
    config.initializer_range = 0.3
    auto: Any = transformers.AutoModelForCausalLM
    if task == "classification":
        auto, config.num_labels = transformers.AutoModelForSequenceClassification, 3
    return auto.from_config(config, dtype=torch.float32).eval()


def _furthest(whole: Any, parts: Any) -> float:
    """Largest difference of a logit, and of a gradient relative to the largest one."""
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def ends(logits: Tensor, embedding: Any) -> tuple[Tensor, Tensor]:
        wanted = logits if logits.dim() == 2 else logits[mask.bool()]
        (gradient,) = torch.autograd.grad(wanted.square().sum(), embedding.weight)
        return wanted.detach(), gradient

    expected = ends(whole(input_ids=ids, attention_mask=mask).logits, whole.get_input_embeddings())
    hidden = parts.middle(parts.head(ids, mask), mask)
    found = ends(parts.tail(hidden, mask), parts.head.model.get_input_embeddings())
    pairs = zip(expected, found, strict=True)
    return float(max((a - b).abs().max() / a.abs().max() for a, b in pairs))
