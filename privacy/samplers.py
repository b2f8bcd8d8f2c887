"""Integers drawn from exact tables: discrete Gaussian and Skellam noise of any scale.

A draw inverts the distribution function. The function is tabulated to 256 bits; a draw compares 64
random bits with it and asks for 192 more in the rare case that 64 leave two values possible. So
probabilities are right to 2^-240 or so, and no floating-point number takes part.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = Callable[[int], NDArray[np.uint64]]
Integers: TypeAlias = NDArray[np.int64]

_BITS = 256  # of a tabulated probability
_TAIL = 178.0  # natural logarithms: e^-178 < 2^-256
_SCALE = 400  # bits of the fixed-point numbers that tables are computed in
_GUIDE = 16  # leading bits by which most draws are looked up at once
_BLOCK = 1 << 16  # draws whose words stay in the cache
_LARGEST = 2048.0  # standard deviation of the largest table

# Wide noise is a sum of draws on finer and coarser lattices: x = r + _COARSE * y. The sum is within
# a factor of 1 +- 2^-130 of the discrete Gaussian (see `discrete_gaussian`).
_FINE = 1024.0
_COARSE = 400


def discrete_gaussian(count: int, std: float, words: Words) -> Integers:
    """`count` integers, each drawn with probability proportional to exp(-n^2 / (2 std^2)).

    Canonne, Kamath and Steinke 2020, definition 1. Up to a `std` of 2048 by table. Beyond, by
    convolution (Peikert 2010, theorem 3.1): r + k y with r and y discrete Gaussians of standard
    deviations s and t has at n the probability exp(-n^2 / (2 (s^2 + k^2 t^2))) times a sum over kZ
    of a Gaussian of width w, 1/w^2 = 1/s^2 + 1/(k t)^2. By Poisson summation that sum is the same
    for all n up to a factor of 1 +- 2 exp(-2 pi^2 (w/k)^2), here below 2^-130, since w > 2.2 k.
    Raises ValueError for a `std` that is not finite or negative.
    """
    _check(std)
    if std == 0.0:
        return np.zeros(count, dtype=np.int64)
    if std <= _LARGEST:
        return _draw(_gaussian_table(std), count, words)
    fine = _draw(_gaussian_table(_FINE), count, words)
    coarse = math.sqrt((std - _FINE) * (std + _FINE)) / _COARSE
    return fine + _COARSE * discrete_gaussian(count, coarse, words)


def skellam(count: int, std: float, words: Words) -> Integers:
    """`count` differences of two Poisson numbers of mean std^2 / 2 each (Agarwal et al. 2021).

    Sums of Skellam noise are Skellam noise, so a `std` beyond 2048 is a sum of tabulated draws.
    Raises ValueError for a `std` that is negative or above 65536.
    """
    _check(std)
    if std > 32 * _LARGEST:
        raise ValueError(
            f"Expected Skellam noise of a standard deviation of at most {32 * _LARGEST:g}, got "
            f"{std:g}; use fewer bits, or discrete Gaussian noise."
        )
    total = np.zeros(count, dtype=np.int64)
    if std == 0.0:
        return total
    parts = math.ceil((std / _LARGEST) ** 2)
    table = _skellam_table(std / math.sqrt(parts))
    for _ in range(parts):
        total += _draw(table, count, words)
    return total


def _check(std: float) -> None:
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"Expected a finite standard deviation of 0 or more, got {std}.")


@dataclass(frozen=True, eq=False)
class _Table:
    """P(X <= first + i) in units of 2^-256, for all i but the last, and its leading 64 bits.

    `guide` maps the leading 16 bits of a draw to i where they decide it, to -1 where not.
    """

    first: int
    bounds: tuple[int, ...]
    leading: NDArray[np.uint64]
    guide: NDArray[np.int32]


def _table(masses: list[int]) -> _Table:
    """Table of a symmetric distribution, from masses of 0, 1, 2, ... in any unit."""
    both = [*masses[:0:-1], *masses]
    sums = list(accumulate(both))
    bounds = tuple((part << _BITS) // sums[-1] for part in sums[:-1])
    leading = np.array([min(bound >> (_BITS - 64), 2**64 - 1) for bound in bounds], np.uint64)
    starts = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(64 - _GUIDE)
    lowest = np.searchsorted(leading, starts, "left")
    highest = np.searchsorted(leading, starts | np.uint64(2 ** (64 - _GUIDE) - 1), "right")
    guide = np.where(lowest == highest, lowest, -1).astype(np.int32)
    return _Table(1 - len(masses), bounds, leading, guide)


@lru_cache(maxsize=16)
def _gaussian_table(std: float) -> _Table:
    inverse = 1 / Fraction(std) ** 2
    ratio, quotient = _exp(-inverse / 2), _exp(-inverse)
    masses = [1 << _SCALE]
    for _ in range(math.ceil(std * math.sqrt(2 * _TAIL))):
        masses.append(masses[-1] * ratio >> _SCALE)
        ratio = ratio * quotient >> _SCALE
    return _table(masses)


@lru_cache(maxsize=16)
def _skellam_table(std: float) -> _Table:
    """Masses e^-v I_n(v), v = std^2, by Miller's backward recurrence I_n-1 = I_n+1 + (2n/v) I_n."""
    variance = Fraction(std) ** 2
    last, start = (_skellam_tail(float(variance), depth) for depth in (_TAIL, 2.5 * _TAIL))
    above, here = 0, 1 << _SCALE
    masses: list[int] = []
    for n in range(start, 0, -1):
        if n <= last:
            masses.append(here)
        step = 2 * n * here * variance.denominator // variance.numerator
        above, here = here, above + step
    return _table([here, *reversed(masses)])


def _skellam_tail(variance: float, depth: float) -> int:
    """Smallest power-of-two step grid n beyond which Chernoff's bound is below exp(-depth)."""

    def exponent(n: float) -> float:
        return n * math.asinh(n / variance) - n * n / (math.hypot(n, variance) + variance)

    n = 1
    while exponent(n) < depth:
        n += max(n // 64, 1)
    return n


def _exp(power: Fraction) -> int:
    """The exponential of a negative number, in units of 2^-_SCALE."""
    context = Context(prec=150, Emin=-(10**9), Emax=10**9)
    exact = context.divide(Decimal(power.numerator), Decimal(power.denominator))
    return int(context.multiply(context.exp(exact), Decimal(2**_SCALE)))


def _draw(table: _Table, count: int, words: Words) -> Integers:
    drawn = np.empty(count, dtype=np.int64)
    for start in range(0, count, _BLOCK):
        block = drawn[start : start + _BLOCK]
        block[:] = _invert(table, words(len(block)), words)
    drawn += table.first
    return drawn


def _invert(table: _Table, drawn: NDArray[np.uint64], words: Words) -> Integers:
    found: Integers = table.guide[drawn >> np.uint64(64 - _GUIDE)].astype(np.int64)
    undecided = np.flatnonzero(found < 0)
    open_words = drawn[undecided]
    index = np.searchsorted(table.leading, open_words, "left")
    equal = table.leading[np.minimum(index, len(table.leading) - 1)] == open_words
    for i in np.flatnonzero(equal):
        exact = int(open_words[i])
        for word in words((_BITS - 64) // 64).tolist():
            exact = exact << 64 | word
        index[i] = bisect_right(table.bounds, exact, int(index[i]))
    found[undecided] = index
    return found
