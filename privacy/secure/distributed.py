"""Noise that the sites of a sum add in shares, so that nobody sees anything but the noisy sum.

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021, Algorithm 1, without its
rotation): each site clips its update, rounds it to the lattice of the sum and adds discrete
Gaussian noise in whole steps, before its masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.section import ConfigError
from privacy import samplers
from privacy.client_level import clipped
from privacy.noise import Source
from privacy.secure.fixed_point import FixedPoint, Words

# Chance that the sum wraps around anywhere: a loss of that round's use, not of privacy.
_WRAPS = 2.0**-40
# A sum of discrete Gaussians is not one. With t shares of a standard deviation of 4 steps or more,
# their theorem 1 adds at most 10 t exp(-16 pi^2) sqrt(D) to 1 / multiplier: below 1e-50 for any D
# and t that there are. The margin covers that, and the roundings of float64.
_LEAST = 4.0
_MARGIN = 1.0 + 1e-9


@dataclass(frozen=True)
class Noise:
    """What the noise of one sum rests on; all of it is public.

    `clip_norm` bounds the L2 norm of an update. `multiplier` is the standard deviation of the noise
    of `threshold` sites over the sensitivity of their sum: what one site adds to it, against
    nothing. `rounding` is how many steps rounding moves a number at most.
    """

    clip_norm: float
    multiplier: float
    rounding: float

    def numbers(
        self, bits: int, range_: float, sites: int, threshold: int, size: int
    ) -> FixedPoint:
        """The finest numbers in which a sum of `size` values and its noise have room.

        The noise of all sites is sub-Gaussian, so that it stays within `reach` times the
        sensitivity but for a chance of 2^-40. Raises ConfigError where `bits` are too few.
        """
        half, range_ = 2 ** (bits - 1) - 1, min(range_, self.clip_norm)
        tail = math.sqrt(2.0 * math.log(2.0 * size / _WRAPS))
        reach = tail * self.multiplier * _MARGIN * math.sqrt(sites / threshold)
        left = half - reach * self.rounding * math.sqrt(size)
        limit = math.floor(left / (sites + reach * self.clip_norm / range_))
        if limit >= 1:
            numbers = FixedPoint(bits, range_, sites, room=half - sites * limit)
            if self.share(numbers, threshold, size) >= _LEAST:
                return numbers
        raise ConfigError(
            f"Expected secure.bits that hold the sum of {sites} sites and its noise on {size} "
            f"values, got {bits}; set more bits, or a lower privacy.noise-multiplier."
        )

    def sensitivity(self, numbers: FixedPoint, size: int) -> float:
        """How far (L2, in steps) one site moves the sum of `size` values, rounding included."""
        return self.clip_norm / numbers.step + self.rounding * math.sqrt(size)

    def share(self, numbers: FixedPoint, threshold: int, size: int) -> float:
        """Standard deviation, in steps, of the noise that each site adds."""
        whole = self.multiplier * self.sensitivity(numbers, size)
        return whole * _MARGIN / math.sqrt(threshold)

    def encode(
        self,
        numbers: FixedPoint,
        update_D: NDArray[np.float32],
        threshold: int,
        source: Source,
        generator: np.random.Generator | None = None,
    ) -> tuple[Words, int]:
        """A site's numbers, clipped and with its share of the noise, and how many were cut off.

        Raises ConfigError for an update that is not finite.
        """
        if not np.isfinite(update_D).all():
            raise ConfigError(
                "Expected a finite update to add noise to, got one that is not; lower "
                "train.learning-rate."
            )
        size = len(update_D)
        bounded_D = clipped(torch.from_numpy(update_D), self.clip_norm).numpy()
        words, cut = numbers.encode(bounded_D, 1, 1, generator)
        drawn = samplers.discrete_gaussian(size, self.share(numbers, threshold, size), source.words)
        words[:size] += drawn.astype(words.dtype)  # modulo a power of two, as all that follows
        return numbers.reduced(words), cut
