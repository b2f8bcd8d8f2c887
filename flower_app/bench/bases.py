"""Base models with random weights for the benchmarks, in hub format, made in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from models.base import quiet, seeded
from models.embedded import Recipe, train_tokenizer


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama with tied embeddings and a byte-level BPE of `vocabulary` tokens."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    positions: int = 512

    def __str__(self) -> str:
        """The shape in words."""
        return (
            f"Llama, random weights, hidden {self.hidden}, {self.layers} layers, "
            f"{self.heads} heads ({self.key_value_heads} key/value), MLP {self.intermediate}, "
            f"{self.vocabulary} tokens, tied embeddings"
        )


SMALL = Shape("260K", 64, 5, 8, 4, 172, 512)
"""The shape of stories260K."""

DEFAULT = Shape("1M", 128, 4, 4, 4, 384, 2048)
"""The shape of the embedded default."""

LARGE = Shape("130M", 768, 12, 12, 12, 3584, 2048)
"""As wide and deep as GPT-2 small; a wider MLP makes up for the small vocabulary."""


def save_base(folder: Path, shape: Shape, texts: Sequence[str]) -> int:
    """Write model and tokenizer into `folder`; returns the number of parameters."""
    quiet()
    tokenizer = train_tokenizer(list(texts), Recipe(vocab_size=shape.vocabulary))
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(0):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())
