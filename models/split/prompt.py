"""A soft prompt before every text (Lester et al. 2021), trained at the site in a frozen head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.base import seeded
from models.config import PayloadConfig
from models.payload import start_ids
from models.seeds import derive
from models.split.cut import Head
from models.split.step import in_front


class PromptedHead(Head):
    """A head whose hidden states begin with those of the prompt's (tokens, hidden) vectors."""

    def __init__(self, head: Head, start: Tensor) -> None:
        super().__init__(head.model, head.place, head.blocks, head.first)
        # Called as in the whole model under PEFT.
        self.prompt_encoder = nn.ModuleDict({"embedding": nn.Embedding(*start.shape)})
        self._prompt.data.copy_(start)

    @property
    def _prompt(self) -> nn.Parameter:
        weight = self.prompt_encoder["embedding"].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def virtual_tokens(self) -> int:
        """Positions that the prompt takes of the context."""
        return len(self._prompt)

    def name_in_whole(self, name: str) -> str:
        """As of any part; the prompt is in none of the model's modules."""
        return name if name.startswith("prompt_encoder") else super().name_in_whole(name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        """Hidden states (batch, virtual tokens + tokens, hidden) of token ids (batch, tokens)."""
        text = self.model.get_input_embeddings()(input_ids)
        prompt = self._prompt.to(text.dtype).expand(len(text), -1, -1)
        embedded = torch.cat([prompt, text], dim=1)
        mask = None if attention_mask is None else in_front(attention_mask, embedded, 1)
        return self.model(inputs_embeds=embedded, attention_mask=mask, **rest).last_hidden_state


def prompted(head: Head, config: PayloadConfig, tokenizer: Any, seed: int) -> PromptedHead:
    """A head with `payload.num-virtual-tokens` before every text, started as `payload.init` says.

    A random start has the standard deviation that the model's own weights once started with, so
    that the server, which draws it for all, need not have the embeddings. Raises ConfigError for an
    `init-text` without words.
    """
    count, shape = config.num_virtual_tokens, head.model.config
    with seeded(derive(seed, "prompt")):
        if config.init == "random":
            spread = float(getattr(shape, "initializer_range", 0.02))
            return PromptedHead(head, torch.randn(count, shape.hidden_size) * spread)
        vocabulary = head.model.get_input_embeddings().weight
        ids = start_ids(config, count, len(vocabulary), tokenizer)
        start = vocabulary[ids]
    return PromptedHead(head, start.detach().float())
