"""Secret sharing over a prime field (Shamir 1979): any `threshold` shares give the secret back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
"""The smallest prime above 2**256, so that every 32-byte secret is an element of the field."""

SECRET_BYTES = 32
SHARE_BYTES = 33


class ShareError(ValueError):
    """Shares, or a threshold, from which no secret can be had."""


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Share a 32-byte secret between holders, known by distinct points from 1.

    Fewer than `threshold` shares say nothing about it. Raises ShareError.
    """
    if len(secret) != SECRET_BYTES:
        raise ShareError(f"Expected a secret of {SECRET_BYTES} bytes, got {len(secret)}.")
    if not 1 <= threshold <= len(points):
        raise ShareError(f"Expected a threshold from 1 to {len(points)} shares, got {threshold}.")
    _check_points(points)
    polynomial = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _at(polynomial, point).to_bytes(SHARE_BYTES) for point in points}


def combine(shares: Mapping[int, bytes], basis: Mapping[int, int] | None = None) -> bytes:
    """The secret of shares by point; wrong or too few shares give a wrong one, or ShareError.

    `basis` is `lagrange` of the same points, for many secrets with the same holders.
    """
    basis = lagrange(list(shares)) if basis is None else basis
    total = sum(basis[point] * int.from_bytes(share) for point, share in shares.items()) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise ShareError("Expected shares of one secret, got some that do not belong together.")
    return total.to_bytes(SECRET_BYTES)


def lagrange(points: Sequence[int]) -> dict[int, int]:
    """Coefficients with which the values of a polynomial at `points` add up to that at zero."""
    _check_points(points)
    basis: dict[int, int] = {}
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        basis[point] = above * pow(below, -1, PRIME) % PRIME
    return basis


def _at(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ShareError(f"Expected distinct points from 1, got {list(points)[:10]}.")
