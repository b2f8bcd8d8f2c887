"""Attention within each document of a packed batch, and nowhere across."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "florilegium-packed"
"""Name under which transformers finds this attention."""


class PackingError(ValueError):
    """A model that packed batches would train wrongly."""


def enable(model: PreTrainedModel) -> bool:
    """Let a causal model take packed batches besides ordinary ones; False if it cannot.

    Two short documents, packed, must come out as they do alone; a model for which they do not
    (one with recurrent layers, soft-capped logits, attention sinks or position biases, say) is left
    as it was.
    """
    before = model.config._attn_implementation
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if before == NAME:
        return True
    if before != "sdpa" or "chunked_attention" in kinds:  # Chunks show in long documents only.
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        keeps = _keeps_apart(model)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        keeps = False
    if not keeps:
        model.set_attn_implementation(before)
    return keeps


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel) -> bool:
    """Whether logits of two documents in one batch equal those of the documents alone."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(1, 17) * 7919 % vocabulary).to(model.device)
    documents = torch.split(ids, [7, 9])
    positions = torch.cat([torch.arange(len(row)) for row in documents]).to(model.device)
    training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in documents])
        mask = lengths_mask([len(row) for row in documents]).to(model.device)
        together = model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=mask
        ).logits[0]
    finally:
        model.train(training)
    tolerance = 1e-4 if alone.dtype == torch.float32 else 3e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def lengths_mask(lengths: list[int]) -> Tensor:
    """Document lengths in the form of a 4-D mask, (1, 1, 1, documents) int64.

    Transformers hands 4-D masks to the attention function untouched, whatever the architecture and
    whether or not there is a cache. A model without this attention fails on it with an error, where
    `position_ids` alone would silently let documents see each other (with `use_cache`, say).
    """
    return torch.tensor(lengths, dtype=torch.long)[None, None, None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document by itself; ordinary masks take the library's own path.

    `query`, `key` and `value` are (1, heads, tokens, head size). The cost is the sum of squared
    document lengths, where a block-diagonal mask costs the square of the sum.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    refused = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if refused or not getattr(module, "is_causal", True):
        raise PackingError(
            f"Expected plain causal attention under packing, got {', '.join(refused) or 'other'} "
            f"in {type(module).__name__}; set train.packing='off'."
        )
    groups = int(getattr(module, "num_key_value_groups", 1))
    lengths = attention_mask.flatten().tolist()
    window = kwargs.get("sliding_window")
    parts = zip(
        torch.split(query, lengths, dim=2),
        torch.split(repeat_kv(key, groups), lengths, dim=2),
        torch.split(repeat_kv(value, groups), lengths, dim=2),
        strict=True,
    )
    outputs = [
        _attend(q, k, v, dropout=dropout, scaling=scaling, window=window) for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        at = torch.arange(length, device=query.device)
        behind = at[:, None] - at[None, :]
        mask = (behind >= 0) & (behind < window)
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling
    )
