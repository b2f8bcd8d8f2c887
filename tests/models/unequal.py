"""Rows of unequal length and number of labels, and payloads to train and score on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.base import load
from models.batches import Batch, eval_batches
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.payload import Payload, attach
from models.text import IGNORED, Causal, Example

PLAIN = TrainConfig(optimizer="sgd", max_grad_norm=0.0)


def example(length: int, counted: int, seed: int) -> Causal:
    """Random ids of which the last `counted` are labels."""
    ids = torch.randint(3, 270, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[: length - counted] = IGNORED
    return Causal(ids, labels)


UNEQUAL = [example(20, 19, 0), example(18, 2, 1), example(9, 1, 2), example(7, 6, 3)]


def payload_of(
    folder: Path, kind: str = "full", *, task: str = "causal-lm", **keys: Any
) -> Payload:
    wanted = ModelConfig.model_validate({"name": str(folder), "task": task})
    base = load(wanted, num_labels=3 if task == "classification" else 0)
    config = PayloadConfig.model_validate({"kind": kind, "num_virtual_tokens": 3, **keys})
    fresh = base.fresh_modules
    return attach(base.model, config, task=task, fresh_modules=fresh, seed=1)


def batches_of(size: int, examples: Sequence[Example] = UNEQUAL) -> Iterator[Batch]:
    return eval_batches(examples, size, 0)
