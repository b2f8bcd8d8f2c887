"""Noise that later rounds take back in part, for sites that take turns instead of being sampled.

What is protected is the product C x of a lower triangular matrix with the rounds' aggregates x, by
independent noise z; C^-1 (C x + z) = x + C^-1 z is what is released. Here C is the banded square
root of the matrix of prefix sums (Kalinin and Lampert 2024): c_0 = 1 and c_j = c_{j-1} (2j - 1) /
2j up to j = bands - 1, else 0. One band is independent noise. Rounds are counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.section import ConfigError

_MOST_BANDS = 32  # that are tried; each band but the first keeps one vector across rounds

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Correlated:
    """`rounds` rounds in which each site has its turn every `period` rounds; `bands` of C.

    Build it with `plan`, which checks the numbers.
    """

    rounds: int
    period: int
    bands: int

    @property
    def coefficients(self) -> Matrix:
        """c_0, ..., c_{bands - 1}: the first column of C, all positive and falling."""
        odd = np.arange(1, 2 * self.bands - 2, 2)
        return np.concatenate([[1.0], np.cumprod(odd / (odd + 1.0))])

    @property
    def turns(self) -> int:
        """The most turns that a site has in a run."""
        return -(-self.rounds // self.period)

    @property
    def gain(self) -> float:
        """Most that one turn moves C x (L2, Frobenius), for a site that moves each x by at most 1.

        For u_t with |u_t| <= 1 in the site's turns and 0 else, |C u|^2 is a sum of <u_s, u_t> with
        the coefficients (C^T C)_st >= 0, so that it is largest where all u_t are the same unit
        vector; this holds of every part of the rows of C as well. The first site to have its turn
        has most of them. Cut where its turns begin, the squares add up over turns: with noise
        `gain` times the noise multiplier, k turns spend no more than k Gaussian releases.
        """
        moved = np.zeros(self.rounds)
        for turn in range(0, self.rounds, self.period):
            column = self.coefficients[: self.rounds - turn]
            moved[turn : turn + len(column)] += column
        return float(
            np.sqrt(np.add.reduceat(moved**2, np.arange(0, self.rounds, self.period)).max())
        )

    @property
    def error(self) -> float:
        """Root of the mean square of the noise in x_1 + ... + x_t over all t, for multiplier 1."""
        inverse = np.zeros(self.rounds)
        for index in range(self.rounds):
            behind = inverse[max(0, index - self.bands + 1) : index][::-1]
            inverse[index] = (index == 0) - self.coefficients[1 : len(behind) + 1] @ behind
        summed = np.cumsum(inverse)
        weights = 1.0 - np.arange(self.rounds) / self.rounds
        return self.gain * float(np.sqrt(weights @ summed**2))


def plan(rounds: int, fraction: float, bands: int = 0) -> Correlated:
    """Turns for a `fraction` of the sites in each round, with 0 `bands` those of least error.

    With a turn in every round that is one band: what C costs is then the sum of |(C^T C)_st| over
    all s and t, and the C of least error for its cost is diagonal (docs/privacy.md).
    Raises ConfigError for a fraction that is not one over a whole number.
    """
    period = round(1.0 / fraction)
    if abs(period * fraction - 1.0) > 1e-3:
        raise ConfigError(
            "Expected strategy.fraction to be one over a whole number with privacy.noise="
            f"'correlated', such as {1.0 / max(period, 1):.4g}, got {fraction:g}; change it."
        )
    if bands > rounds:
        raise ConfigError(
            f"Expected privacy.bands of at most run.rounds={rounds}, got {bands}; lower it, or set "
            "0."
        )
    tried = [bands] if bands else range(1, min(rounds, _MOST_BANDS) + 1)
    return min((Correlated(rounds, period, b) for b in tried), key=lambda c: c.error)
