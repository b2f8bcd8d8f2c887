"""Payloads on tiny models, and records of unequal length for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base import load
from models.batches import Batches
from models.config import ModelConfig, PayloadConfig
from models.payload import Payload, attach
from models.text import IGNORED, Causal, Classified, Example

Payloads = Callable[..., Payload]


@pytest.fixture
def payload_of(tiny_models: Mapping[str, Path]) -> Payloads:
    """Attach a payload to a fresh tiny model, with no tensor left at zero.

    The model has no dropout of its own, or a `dropped` share everywhere.
    """

    def build(
        kind: str, model: str = "llama", task: str = "causal-lm", dropped: float = 0.0, **keys: Any
    ) -> Payload:
        wanted = ModelConfig.model_validate({"name": str(tiny_models[model]), "task": task})
        base = load(wanted, num_labels=3 if task == "classification" else 0)
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropped
        keys = {"kind": kind, "num_virtual_tokens": 3, **keys}
        payload = attach(
            base.model, PayloadConfig.model_validate(keys), task=task,
            fresh_modules=base.fresh_modules, seed=1,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        payload.load(
            {n: t + 0.05 * torch.randn(t.shape, generator=generator)
             for n, t in payload.select().items()}
        )  # fmt: skip
        return payload

    return build


def records(task: str, count: int = 5, seed: int = 0) -> list[Example]:
    """Random records, of which each has another length and number of labels."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Example] = []
    for number in range(count):
        ids = torch.randint(3, 270, (4 + 3 * number,), generator=generator)
        if task == "classification":
            found.append(Classified(ids, None, number % 3))
            continue
        labels = ids.clone()
        labels[: 1 + number] = IGNORED
        found.append(Causal(ids, labels))
    return found


def batches_of(examples: list[Example], size: int = 2) -> Batches:
    return Batches(examples, batch_size=size, seed=0, pad_id=0, packing=False, max_length=64)
