"""Token ids recovered from hidden states, as the server of a split model could try.

Two attacks on what a head sends: the nearest row of the model's embedding, which needs nothing but
the public base model, and a decoder trained on public rows that went through the same head (the
learning-based part of BiSR, Chen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, normalize

from models.base import seeded
from models.split.noise import clipped

IGNORED = -100
_BATCH = 32
_NEGATIVES = 1024  # wrong answers that a token is held against in training

# Hidden states (batch, tokens, hidden) -> what leaves the site instead of them.
Guard = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Seen:
    """Rows as the server sees them: `hidden` (N, tokens, hidden) and `mask` (N, tokens).

    `ids` (N, tokens) is what it wants to know, IGNORED where nothing is to be found out. Rows are
    padded on the right and lie in the order of their lengths.
    """

    hidden: Tensor
    mask: Tensor
    ids: Tensor

    def batches(self, order: torch.Generator | None = None) -> Iterator[Seen]:
        """A few rows at a time, without the padding that all of them have."""
        starts = torch.arange(0, len(self.ids), _BATCH)
        if order is not None:
            starts = starts[torch.randperm(len(starts), generator=order)]
        for start in starts.tolist():
            rows = slice(start, start + _BATCH)
            longest = int(self.mask[rows].sum(1).max())
            yield Seen(
                self.hidden[rows, :longest], self.mask[rows, :longest], self.ids[rows, :longest]
            )

    def chance(self) -> float:
        """Share of tokens that a guess of the most frequent one finds."""
        counts = self.ids[self.ids != IGNORED].bincount()
        return float(counts.max() / counts.sum())


def clipped_and_noised(clip: float, multiplier: float, generator: torch.Generator) -> Guard:
    """Clips each token's hidden state to the norm `clip` and adds N(0, (multiplier clip)²)."""

    def guard(hidden: Tensor) -> Tensor:
        draw = torch.randn(hidden.shape, generator=generator)
        return clipped(hidden, clip).to(hidden) + multiplier * clip * draw

    return guard


class Decoder(nn.Module):
    """One transformer layer between hidden states and rows of an embedding, which it starts from.

    `embedding` (vocabulary, hidden) is the base model's; `heads` is of the layer's attention.
    """

    def __init__(self, embedding: Tensor, *, heads: int, seed: int = 0) -> None:
        super().__init__()
        width = embedding.shape[1]
        with seeded(seed):
            self.layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.out = nn.Linear(width, width)
        with torch.no_grad():
            nn.init.eye_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.rows = _directions(embedding)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Directions (batch, tokens, hidden) to compare with the embedding's rows."""
        given = layer_norm(hidden, hidden.shape[-1:])
        found: Tensor = self.layer(given, src_key_padding_mask=mask == 0)
        return self.scale * normalize(self.out(found), dim=-1)

    def learn(self, seen: Seen, guard: Guard, *, epochs: int, generator: torch.Generator) -> None:
        """Train on public rows behind the guard, which draws anew in every epoch."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        steps = epochs * math.ceil(len(seen.ids) / _BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        for _ in range(epochs):
            for batch in seen.batches(generator):
                loss = self._loss(batch, guard, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def _loss(self, batch: Seen, guard: Guard, generator: torch.Generator) -> Tensor:
        wanted = batch.ids != IGNORED
        right = batch.ids[wanted]
        others = torch.randint(len(self.rows), (_NEGATIVES,), generator=generator)
        candidates = torch.cat([right, others]).unique()
        found = self(guard(batch.hidden), batch.mask)[wanted]
        return cross_entropy(found @ self.rows[candidates].T, torch.searchsorted(candidates, right))

    @torch.no_grad()
    def recover(self, batch: Seen) -> Tensor:
        """The likeliest ids (batch, tokens)."""
        found: Tensor = self(batch.hidden, batch.mask)
        return (found @ self.rows.T).argmax(-1)


def nearest_embedding(embedding: Tensor) -> Callable[[Seen], Tensor]:
    """Answers each token with the row of the embedding that points most nearly the same way."""
    rows = _directions(embedding)

    def recover(batch: Seen) -> Tensor:
        there = batch.hidden[batch.mask == 1]
        return (normalize(batch.hidden - there.mean(0), dim=-1) @ rows.T).argmax(-1)

    return recover


def _directions(embedding: Tensor) -> Tensor:
    return normalize(embedding - embedding.mean(0), dim=-1)


def share_recovered(attack: Callable[[Seen], Tensor], seen: Seen, guard: Guard) -> float:
    """Share of the wanted tokens of rows behind a guard that an attack gets right."""
    right = total = 0
    for batch in seen.batches():
        found = attack(Seen(guard(batch.hidden), batch.mask, batch.ids))
        wanted = batch.ids != IGNORED
        right += int((found == batch.ids)[wanted].sum())
        total += int(wanted.sum())
    return right / total
