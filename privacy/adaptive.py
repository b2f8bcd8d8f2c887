"""A clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from models.section import ConfigError
from privacy.noise import Source, add_gaussian


@dataclass(frozen=True)
class Adaptive:
    """Moves the norm towards the `quantile` of the updates' norms, by `learning_rate` a round.

    `count_noise` is the standard deviation of the noise on the number of updates within the norm;
    0 lets `count_std` choose.
    """

    quantile: float
    learning_rate: float
    count_noise: float = 0.0

    def count_std(self, noise_multiplier: float, expected: float) -> float:
        """Noise on the count: a twentieth of the `expected` updates, as the paper has it.

        With few of them, twice the noise multiplier, which costs the updates 3 % more noise.
        """
        return self.count_noise or max(expected / 20, 2.0 * noise_multiplier)

    def update_multiplier(self, noise_multiplier: float, expected: float) -> float:
        """Noise multiplier of the updates, so that updates and count together have the given one.

        (z^-2 - (2 s)^-2)^(-1/2), theorem 1 of the paper, with noise s on a count of sensitivity
        1/2. Raises ConfigError where the count alone would spend more than both may.
        """
        if noise_multiplier == 0.0:
            return 0.0
        std = self.count_std(noise_multiplier, expected)
        if 2.0 * std <= noise_multiplier:
            raise ConfigError(
                f"Expected privacy.clip-count-noise above {noise_multiplier / 2:g}, half the noise "
                f"multiplier, got {std:g}; raise it, or set it to 0."
            )
        return 1.0 / math.sqrt(noise_multiplier**-2 - (2.0 * std) ** -2)

    def next_norm(
        self,
        clip_norm: float,
        norms: Iterable[float],
        noise_multiplier: float,
        expected: float,
        source: Source,
    ) -> float:
        """The norm of the next round, from a noisy share of updates within `clip_norm`.

        Each update counts as +1/2 or -1/2 (a site that is missing as 0), over the `expected`
        number: C exp(-learning_rate (share - quantile)), equation 1 of the paper. The indicator is
        norm <= C: a share above the quantile makes C smaller.
        """
        balance = math.fsum(0.5 if norm <= clip_norm else -0.5 for norm in norms)
        exact = torch.tensor([balance], dtype=torch.float64)
        std = self.count_std(noise_multiplier, expected) if noise_multiplier else 0.0
        share = float(add_gaussian(exact, std, source)) / expected + 0.5
        return clip_norm * math.exp(-self.learning_rate * (share - self.quantile))
