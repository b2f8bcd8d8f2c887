"""Clipping and noise on every vector before it leaves the site, in both directions.

What leaves is a vector per token and pass: the head's output, and at the tail the gradient of the
loss. Each is cut down to an L2 norm and noise is added to it, whose distribution and randomness are
the caller's. Vectors at padding do not leave at all: they would tell of the tokens before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.section import ConfigError
from models.split.step import Stream

# Values (float64) and the L2 norm that none of their vectors exceeds -> the same with noise.
Add = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Norms:
    """L2 norms to which vectors of hidden states and of gradients are cut; raises ConfigError."""

    hidden: float
    gradient: float

    def __post_init__(self) -> None:
        for name, norm in (("hidden states", self.hidden), ("gradients", self.gradient)):
            if not 0 < norm < math.inf:
                raise ConfigError(
                    f"Expected a norm above 0 for {name}, got {norm:g}; take about the median of "
                    "their vectors' norms."
                )


@dataclass
class Released:
    """How many vectors left the site with noise."""

    hidden: int = 0
    gradients: int = 0
    held_out: int = 0


@dataclass
class NoisyLink:
    """A link to the middle that lets nothing through without clipping and noise.

    `released` counts the vectors.
    """

    link: Stream
    norms: Norms
    add: Add
    released: Released = field(default_factory=Released)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle, of noisy ones before it."""
        self._masks[key] = mask
        self.released.hidden += int(mask.sum())
        return self.link.forward(key, self._noisy(hidden, mask, self.norms.hidden), mask)

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        """The gradient before the middle, of a noisy one behind it."""
        mask = self._masks.pop(key)
        self.released.gradients += int(mask.sum())
        return self.link.backward(key, self._noisy(gradient, mask, self.norms.gradient))

    def score(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """As `forward`, for held-out rows."""
        self.released.held_out += int(mask.sum())
        return self.link.score(key, self._noisy(hidden, mask, self.norms.hidden), mask)

    def step(self, number: int) -> Future[Tensor]:
        """Done when the middle has taken its optimiser step."""
        return self.link.step(number)

    def _noisy(self, values: Tensor, mask: Tensor, norm: float) -> Tensor:
        there = mask.bool().cpu()
        vectors = clipped(values.detach().cpu()[there], norm)
        found = torch.zeros(values.shape, dtype=torch.float64)
        found[there] = self.add(vectors, norm)
        return found.to(values)


def clipped(vectors: Tensor, norm: float) -> Tensor:
    """Vectors (count, hidden) of at most this L2 norm, float64; those within stay as they are."""
    wide = vectors.double()
    largest = wide.norm(dim=-1, keepdim=True).clamp(min=norm)
    found: Tensor = wide * (norm / largest)
    return found
