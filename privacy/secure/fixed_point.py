"""Real numbers as whole ones whose sums over the sites cannot wrap around.

A weighted update becomes integers modulo 2^bits; the weight itself, a number of examples, follows
in as many more of them as it takes, so that weights add up exactly whatever the precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.section import ConfigError

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

_WEIGHT_BITS = 30  # the gate admits at most 10**9 examples
_CHUNK = 1 << 18


@dataclass(frozen=True)
class FixedPoint:
    """Numbers in [-range, range] as multiples of `step`, summed over at most `sites` sites.

    `room` steps are kept free for noise on the sum.
    """

    bits: int
    range: float
    sites: int
    room: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError where no whole number is left for a single site."""
        if self.limit < 1 or self._limb < 1:
            raise ConfigError(
                f"Expected secure.bits that hold the sum of {self.sites} sites, got {self.bits}; "
                "set more bits or more secure.groups."
            )

    @property
    def limit(self) -> int:
        """Largest magnitude of one site's number, with headroom for the sum of all sites."""
        return int(2 ** (self.bits - 1) - 1 - self.room) // self.sites

    @property
    def step(self) -> float:
        """Difference between neighbouring numbers."""
        return self.range / self.limit

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian words, at least `bits` wide, whose arithmetic wraps at a power of two."""
        return np.dtype("<u2" if self.bits <= 16 else "<u4")

    @property
    def limbs(self) -> int:
        """How many numbers a weight takes."""
        return -(-_WEIGHT_BITS // self._limb)

    @cached_property
    def _limb(self) -> int:
        return min(self.bits - (self.sites - 1).bit_length(), _WEIGHT_BITS)

    def length(self, size: int) -> int:
        """Numbers that an update of `size` parameters and its weight take."""
        return size + self.limbs

    def nbytes(self, size: int) -> int:
        """Bytes of the same on the wire."""
        return -(-self.length(size) * self.bits // 8)

    def encode(
        self,
        update_D: NDArray[np.float32],
        weight: int,
        scale: int,
        generator: np.random.Generator | None = None,
    ) -> tuple[Words, int]:
        """Numbers of `update_D` * weight / scale and of the weight, and how many were cut off.

        `scale` is the largest weight of any site. Rounds to the nearest, and with a generator up or
        down at random so that the mean is right.
        """
        share = min(weight, scale) / scale / self.step
        words = np.empty(self.length(len(update_D)), self.dtype)
        cut = 0
        for start in range(0, len(update_D), _CHUNK):
            part = update_D[start : start + _CHUNK].astype(np.float64) * share
            cut += int(np.count_nonzero(np.abs(part) > self.limit))
            np.clip(part, -self.limit, self.limit, out=part)
            whole = np.rint(part) if generator is None else _randomly(part, generator)
            words[start : start + len(part)] = whole.astype(np.int64).astype(self.dtype)
        base = 2**self._limb
        words[len(update_D) :] = [weight // base**at % base for at in range(self.limbs)]
        return self.reduced(words), cut

    def decode(self, total: Words, scale: int, divisor: int = 0) -> tuple[NDArray[np.float32], int]:
        """The weighted mean (D,) of the sites' updates, and the sum of their weights, of a sum.

        With a `divisor` the weighted sum is divided by that, whoever takes part.
        """
        total, size = self.reduced(total), len(total) - self.limbs
        weight = sum(int(limb) << (self._limb * at) for at, limb in enumerate(total[size:]))
        mean_D = np.empty(size, np.float32)
        factor = self.step * scale / (divisor or max(weight, 1))
        half, modulus = 2 ** (self.bits - 1), 2**self.bits
        for start in range(0, size, _CHUNK):
            part = total[start : min(start + _CHUNK, size)].astype(np.int64)
            mean_D[start : start + len(part)] = np.where(part < half, part, part - modulus) * factor
        return mean_D, weight

    def reduced(self, words: Words) -> Words:
        """The same numbers modulo 2^bits, where words are wider than that."""
        mask = 2**self.bits - 1
        return words if mask == np.iinfo(self.dtype).max else words & self.dtype.type(mask)

    def pack(self, words: Words) -> bytes:
        """Reduced words as bytes without gaps, little-endian."""
        if self.bits == 8 * self.dtype.itemsize:
            return words.astype(self.dtype, copy=False).tobytes()
        octets = words.astype(self.dtype, copy=False).view(np.uint8)
        wide = 8 * self.dtype.itemsize
        bits = np.unpackbits(octets, bitorder="little").reshape(-1, wide)
        return np.packbits(bits[:, : self.bits], bitorder="little").tobytes()

    def unpack(self, data: bytes, length: int) -> Words:
        """The inverse of `pack` for `length` words; raises ValueError for the wrong size."""
        expected = -(-length * self.bits // 8)
        if len(data) != expected:
            raise ValueError(f"Expected {expected} bytes of masked numbers, got {len(data)}.")
        if self.bits == 8 * self.dtype.itemsize:
            return np.frombuffer(data, self.dtype)
        raw = np.frombuffer(data, np.uint8)
        bits = np.unpackbits(raw, count=length * self.bits, bitorder="little")
        wide = np.zeros((length, 8 * self.dtype.itemsize), np.uint8)
        wide[:, : self.bits] = bits.reshape(length, self.bits)
        return np.packbits(wide, bitorder="little").view(self.dtype)


def _randomly(part: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Up or down so that the expectation is the number itself."""
    rounded: NDArray[np.float64] = np.floor(part + generator.random(len(part)))
    return rounded
