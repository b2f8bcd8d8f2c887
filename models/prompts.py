"""Soft prompts of which each row embeds its own, as gradients of single rows need them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from peft import PeftType
from torch import Tensor

_ONCE_A_BATCH = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


@contextmanager
def prompts_by_row(module: Any) -> Iterator[None]:
    """Let prompt tuning embed its virtual tokens for every row of a batch within the block.

    PEFT embeds them once and repeats what comes out. The numbers are the same, but then the
    embedding sees one row, whose gradient is the sum over all of them. Does nothing to others.
    """
    settings = getattr(module, "active_peft_config", None)
    if getattr(settings, "peft_type", None) not in _ONCE_A_BATCH:
        yield
        return
    module.get_prompt = MethodType(_prompts, module)
    try:
        yield
    finally:
        del module.get_prompt


def _prompts(self: Any, batch_size: int, *unused: Any, **unused_too: Any) -> Tensor:
    encoder = self.prompt_encoder[self.active_adapter]
    tokens = self.prompt_tokens[self.active_adapter].to(encoder.embedding.weight.device)
    prompts: Tensor = encoder(tokens.unsqueeze(0).expand(batch_size, -1))
    return prompts
