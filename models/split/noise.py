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
    """How many vectors left the site with noise, and how many of them were longer than the norm."""

    hidden: int = 0
    gradients: int = 0
    held_out: int = 0
    clipped_hidden: int = 0
    clipped_gradients: int = 0

    def __str__(self) -> str:
        """The counts in words."""
        hidden = self.hidden + self.held_out
        return (
            f"{hidden} hidden states ({_percent(self.clipped_hidden, hidden)} clipped) and "
            f"{self.gradients} gradients ({_percent(self.clipped_gradients, self.gradients)} "
            "clipped)"
        )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.0f} %"


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
        noisy, longer = self._noisy(hidden, mask, self.norms.hidden)
        self.released.hidden += int(mask.sum())
        self.released.clipped_hidden += longer
        return self.link.forward(key, noisy, mask)

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        """The gradient before the middle, of a noisy one behind it."""
        mask = self._masks.pop(key)
        noisy, longer = self._noisy(gradient, mask, self.norms.gradient)
        self.released.gradients += int(mask.sum())
        self.released.clipped_gradients += longer
        return self.link.backward(key, noisy)

    def score(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """As `forward`, for held-out rows."""
        noisy, longer = self._noisy(hidden, mask, self.norms.hidden)
        self.released.held_out += int(mask.sum())
        self.released.clipped_hidden += longer
        return self.link.score(key, noisy, mask)

    def step(self, number: int) -> Future[Tensor]:
        """Done when the middle has taken its optimiser step."""
        return self.link.step(number)

    def _noisy(self, values: Tensor, mask: Tensor, norm: float) -> tuple[Tensor, int]:
        """The values that may leave, and how many of their vectors were clipped."""
        there = mask.bool().cpu()
        vectors = values.detach().cpu()[there]
        found = torch.zeros(values.shape, dtype=torch.float64)
        found[there] = self.add(clipped(vectors, norm), norm)
        return found.to(values), int((vectors.double().norm(dim=-1) > norm).sum())


def clipped(vectors: Tensor, norm: float) -> Tensor:
    """Vectors (count, hidden) of at most this L2 norm, float64; those within stay as they are."""
    wide = vectors.double()
    largest = wide.norm(dim=-1, keepdim=True).clamp(min=norm)
    found: Tensor = wide * (norm / largest)
    return found
