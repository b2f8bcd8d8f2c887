"""Gaussian noise that gives away nothing through its low bits, and where its randomness comes from.

Adding a floating-point Gaussian to a floating-point value leaks the value: which sums can occur
at all depends on it (Mironov 2012; Jin et al. 2022). Here the value is rounded to a lattice whose
step depends on the noise alone, and a discrete Gaussian on the same lattice is added (Canonne,
Kamath and Steinke 2020), in integers. The lattice is 2^35 to 2^36 times finer than the
noise, so that each integer's probability is within a factor of 1 +- 2^-64 of a rounded continuous
Gaussian's: accounting for the Gaussian mechanism holds. Rounding D values moves two neighbouring
ones further apart by up to sqrt(D) steps, for which `std_for` adds noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.section import ConfigError
from models.seeds import derive
from privacy import samplers
from privacy.samplers import Words

_FINENESS = 35  # the lattice's step is 2^-35 of the power of two below the standard deviation
_ROOM = 2.0**62  # steps that a value may be away from 0


@dataclass(frozen=True, eq=False)
class Source:
    """Where random words come from: `words(n)` gives n uniform unsigned 64-bit integers."""

    words: Words
    secure: bool


def secure() -> Source:
    """Randomness of the operating system's cryptographic generator: for production.

    Nothing is kept in the process, so that neither a fork nor a restart repeats noise.
    """
    return Source(lambda count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64), True)


def seeded(seed: int, *purpose: str | int) -> Source:
    """Randomness that repeats for the same seed and purpose: for tests and simulations.

    Whoever knows the seed can subtract the noise, so it protects nothing. Give each round and
    mechanism a purpose of its own.
    """
    generator = np.random.PCG64(derive(seed, "noise", *purpose))
    return Source(generator.random_raw, False)


def step(std: float) -> float:
    """Step of the lattice for noise of a standard deviation: a power of two; 0 for no noise.

    Raises ConfigError for a standard deviation that float64 cannot carry.
    """
    if std == 0.0:
        return 0.0
    if not (math.isfinite(std) and 1e-200 < std < 1e200):
        raise ConfigError(
            f"Expected noise of a standard deviation between 1e-200 and 1e200, got {std:g}; "
            "check the clipping norm and privacy.noise-multiplier."
        )
    return math.ldexp(0.5, math.frexp(std)[1] - _FINENESS)


def std_for(sensitivity: float, noise_multiplier: float, size: int) -> float:
    """Standard deviation that `noise_multiplier` asks for, rounding `size` values included.

    `sensitivity` (L2) is that of the value before `add_gaussian` rounds it.
    """
    # Twice the step, since the sum may pass the next power of two.
    rounding = 2.0 * step(sensitivity * noise_multiplier) * math.sqrt(size)
    return noise_multiplier * (sensitivity + rounding)


def gaussian(shape: Sequence[int], std: float, source: Source) -> Tensor:
    """Discrete Gaussian noise on the lattice of `step(std)`, float64.

    Only for values on that lattice, or that are public: `add_gaussian` rounds others to it.
    """
    drawn = samplers.discrete_gaussian(math.prod(shape), _in_steps(std), source.words)
    return torch.from_numpy(drawn).view(tuple(shape)).double() * step(std)


def add_gaussian(value: Tensor, std: float, source: Source) -> Tensor:
    """The value rounded to the lattice of `step(std)`, plus discrete Gaussian noise; float64.

    Without noise (std 0) the value comes back as it is. Raises ConfigError for a value that is not
    finite or too large for noise that fine.
    """
    if std == 0.0:
        return value.double()
    steps = (value.double() / step(std)).round()
    # Written so that NaN is refused as well.
    if not bool((steps.abs() < _ROOM).all()):
        raise ConfigError(
            f"Expected finite values below {_ROOM * step(std):g} with noise of standard deviation "
            f"{std:g}, got {float(value.abs().max()):g}; clip the values first."
        )
    drawn = samplers.discrete_gaussian(value.numel(), _in_steps(std), source.words)
    noisy = steps.to(torch.int64) + torch.from_numpy(drawn).view(value.shape)
    # Beyond 2^53 steps the conversion rounds; the result is a function of the noisy integer alone.
    return noisy.double() * step(std)


def discrete_gaussian(shape: Sequence[int], std: float, source: Source) -> Tensor:
    """Integers (int64) of the discrete Gaussian distribution; `std` in units of 1."""
    drawn = samplers.discrete_gaussian(math.prod(shape), std, source.words)
    return torch.from_numpy(drawn).view(tuple(shape))


def skellam(shape: Sequence[int], std: float, source: Source) -> Tensor:
    """Integers (int64) of the symmetric Skellam distribution, of variance std^2; std <= 65536."""
    drawn = samplers.skellam(math.prod(shape), std, source.words)
    return torch.from_numpy(drawn).view(tuple(shape))


def _in_steps(std: float) -> float:
    return std / step(std) if std else 0.0
