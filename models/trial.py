"""A tiny forward pass that shows whether a module computes what training and scoring rely on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.section import ConfigError


@torch.no_grad()
def check_forward(module: Any, kind: str, task: str) -> None:
    """Refuse a module whose results depend on padding, or on text that is still to come.

    Both happen in silence: an encoder taken for a causal model sees the tokens it shall predict,
    and some models with a class head read it off at the last position of a padded row when
    virtual tokens stand before the text. Raises ConfigError, also when the forward pass fails.
    Leaves the module in evaluation mode, as from_pretrained does.
    """
    module.eval()
    try:
        _check(module, kind, task)
    except ConfigError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"Expected payload.kind={kind!r} to compute with this model, but it fails: {error}; "
            "change payload.kind or payload.options."
        ) from error


def _check(module: Any, kind: str, task: str) -> None:
    ids = _ids(module)
    short = ids[:, :5]
    alone = _logits(module, short, torch.ones_like(short))
    padding = torch.zeros_like(ids)
    padding[:, 5:] = 1
    pad_id = module.config.get_text_config().pad_token_id or 0
    rows = torch.cat([ids, ids.masked_fill(padding.bool(), pad_id)])
    padded = _logits(module, rows, torch.cat([torch.ones_like(ids), 1 - padding]))[1:]
    if task == "classification":
        if not _close(module, alone, padded):
            raise ConfigError(
                f"Expected payload.kind={kind!r} to give a text the same class scores with and "
                f"without padding, but it does not in this model ({module.config.model_type}); "
                "pick 'lora', 'prefix' or 'full'."
            )
        return
    if not _close(module, alone, padded[:, :5]):
        raise ConfigError(
            f"Expected payload.kind={kind!r} to give a text the same logits with and without "
            f"padding, but it does not in this model ({module.config.model_type}); pick another."
        )
    other = short.clone()
    other[:, -1] = ids[:, -1]
    changed = _logits(module, other, torch.ones_like(other))
    if not _close(module, alone[:, :-1], changed[:, :-1]):
        raise ConfigError(
            f"Expected a causal model, got one ({module.config.model_type}) that sees the tokens "
            "it is to predict; use it with model.task='classification', or name a causal one."
        )


def _ids(module: Any) -> Tensor:
    """Eight token ids, shape (1, 8), of which those at 4 and 7 differ."""
    vocabulary = module.config.get_text_config().vocab_size
    device = next(module.parameters()).device
    ids: Tensor = torch.arange(1, 9, device=device) * 7919 % vocabulary
    return ids[None]


def _logits(module: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of each row, without those of virtual tokens."""
    logits: Tensor = module(input_ids=ids, attention_mask=mask).logits
    if logits.dim() == 3:
        logits = logits[:, -ids.shape[1] :]
    return logits


def _close(module: Any, expected: Tensor, found: Tensor) -> bool:
    # Low precision rounds differently in batches of other shapes, and 8 bits treat outliers apart
    # that they find in a whole batch; what is looked for is far larger.
    quantised = getattr(module.config, "quantization_config", None) is not None
    tolerance = 0.1 if quantised or expected.dtype != torch.float32 else 1e-3
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6)
