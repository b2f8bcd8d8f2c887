"""Payloads on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from models.base import Base, load
from models.config import ModelConfig, PayloadConfig
from models.payload import Payload, attach

Attach = Callable[..., tuple[Base, Payload]]


@pytest.fixture
def attached(tiny_models: Mapping[str, Path]) -> Attach:
    """Attach a payload with the given keys to a fresh tiny model."""

    def build(
        kind: str,
        *,
        model: str = "llama",
        task: str = "causal-lm",
        dtype: str = "float32",
        seed: int = 1,
        **keys: Any,
    ) -> tuple[Base, Payload]:
        settings = ModelConfig.model_validate(
            {"name": str(tiny_models[model]), "task": task, "dtype": dtype}
        )
        base = load(settings, num_labels=3 if task == "classification" else 0, seed=seed)
        payload = attach(
            base.model,
            PayloadConfig.model_validate({"kind": kind, "num_virtual_tokens": 4, **keys}),
            tokenizer=base.tokenizer,
            task=task,
            fresh_modules=base.fresh_modules,
            seed=seed,
        )
        return base, payload

    return build
