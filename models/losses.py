"""The loss of each row by itself, where a model's own is the mean over the labels of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from models.text import IGNORED


def row_losses(module: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean loss over the counted labels of each row, in nats, shape (rows,).

    For one row alone it is the model's own loss. A row without a counted label has a loss of 0.
    """
    logits = module(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return losses_of(logits, inputs["labels"])


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits: of classes (rows, classes), or (rows, tokens, vocabulary)."""
    if labels.dim() == 1:
        return functional.cross_entropy(logits.float(), labels, reduction="none")
    logits = logits[:, -labels.shape[1] :]  # virtual tokens stand before the text
    following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(following.shape)
    return losses.sum(-1) / (following != IGNORED).sum(-1).clamp(min=1)
