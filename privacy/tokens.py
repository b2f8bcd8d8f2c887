"""Local differential privacy of single vectors: what noise on one token's activation is worth.

Each vector that leaves is clipped to an L2 norm, so that replacing it by any other one moves it by
at most twice that norm: the sensitivity, under the relation *replace-one*. The guarantee is for one
vector. It is **not** one for a token, still less for a text: a token shows in the vectors of those
that follow it, in its gradient, and in every pass over its row, and all of these add up.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from models.section import ConfigError
from privacy import accounting, noise
from privacy.noise import Source


def epsilon_of_vectors(noise_multiplier: float, delta: float, vectors: int = 1) -> float:
    """Epsilon of that many vectors that depend on one record; raises ConfigError.

    `noise_multiplier` is the standard deviation of the noise over the clipping norm, half of which
    is left over the sensitivity. Infinite without noise.
    """
    return accounting.epsilon(noise_multiplier / 2, 1.0, vectors, delta)


def adding(source: Source, noise_multiplier: float) -> Callable[[Tensor, float], Tensor]:
    """Adds noise to vectors (count, hidden) of a norm, in proportion to it; raises ConfigError.

    Rounding to the noise's lattice is made up for by a little more noise.
    """
    if not noise_multiplier > 0:
        raise ConfigError(
            f"Expected a noise multiplier above 0 for activations, got {noise_multiplier:g}; set "
            "one, or leave the noise out."
        )

    def add(vectors: Tensor, norm: float) -> Tensor:
        std = noise.std_for(2 * norm, noise_multiplier / 2, vectors.shape[-1])
        return noise.add_gaussian(vectors, std, source)

    return add
