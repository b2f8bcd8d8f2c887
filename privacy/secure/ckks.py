"""Whole numbers in CKKS ciphertexts, which anyone can add and only a secret key opens.

CKKS (Cheon et al. 2017) is approximate. Who gets approximate decryptions of ciphertexts that it
knows can compute the secret key (Li and Micciancio 2021). So what is encrypted are whole numbers,
the same as behind masks, and what is opened is rounded to whole numbers again: the exact sum, which
says nothing of the encryption's noise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.secure.ckks_keys import SCALE, SLOTS, Key, adding, tenseal
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.terms import Terms

# A slot holds sums below 2^37: times the scale that is 2^58, and the modulus of 2^60 leaves 2^59
# for either sign. The noise of n encryptions has in a slot a standard deviation of some
# 1400 sqrt(n) / SCALE: for a thousand sites a twelfth of what is clear below.
_SLOT_BITS = 37
MOST_SITES = 1000
"""Sites of one sum."""
_CLEAR = 0.25  # further from a whole number than this no sum of fresh ciphertexts lies
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 2 * SLOTS * 2 * 8 + 4096  # of a ciphertext: two polynomials of 60-bit numbers


def numbers_per_slot(bits: int) -> int:
    """Numbers of `bits` that travel as one."""
    return _SLOT_BITS // bits


def encrypt(key: Key, terms: Terms, site: str, words: Words) -> bytes:
    """A site's numbers and, behind them, a 1 in the place of the site among the members."""
    library = tenseal()
    slots = np.concatenate([_packed(terms, words), _present(terms, [site])])
    parts = [
        library.ckks_vector(key.context, slots[at : at + SLOTS]).serialize()
        for at in range(0, len(slots), SLOTS)
    ]
    return _joined(parts)


class Total:
    """The sum of ciphertexts of `size` slots, added as they come; knows no key."""

    def __init__(self, terms: Terms) -> None:
        self._sizes = _sizes(terms)
        self._context = adding()
        self._vectors: list[Any] = []

    def add(self, data: bytes) -> None:
        """Add what `encrypt` gave; raises SecureError for anything else, which changes nothing."""
        vectors = _vectors(self._context, data, self._sizes)
        if not self._vectors:
            self._vectors = vectors
            return
        for mine, other in zip(self._vectors, vectors, strict=True):
            mine.add_(other)

    def dump(self) -> bytes:
        """The sum, still encrypted."""
        return _joined([vector.serialize() for vector in self._vectors])


def decrypt(key: Key, terms: Terms, active: Sequence[str], data: bytes) -> Words:
    """The numbers of the sum over the `active` sites.

    Raises SecureError for what is not the sum of one ciphertext of each of them under this key.
    """
    vectors = _vectors(key.context, data, _sizes(terms))
    slots = np.concatenate([np.asarray(vector.decrypt()) for vector in vectors])
    whole = np.rint(slots)
    present = _present(terms, active)
    if np.abs(slots - whole).max() > _CLEAR or (whole[-len(present) :] != present).any():
        raise SecureError(
            f"Expected the sum of one update each of {', '.join(active)}, got something else: a "
            "site encrypts with another key, or the server has added up others."
        )
    return _unpacked(terms, whole[: -len(present)].astype(np.int64))


def _packed(terms: Terms, words: Words) -> NDArray[np.float64]:
    """Signed numbers, several in a slot, then the weight's, which are not signed, one each."""
    bits, per = terms.bits, numbers_per_slot(terms.bits)
    signed = words[: terms.size].astype(np.int64)
    signed -= (signed >> (bits - 1)) << bits
    padded = np.zeros(-(-terms.size // per) * per, np.int64)
    padded[: terms.size] = signed
    packed = padded.reshape(-1, per) @ (1 << bits * np.arange(per))
    return np.concatenate([packed, words[terms.size :].astype(np.int64)]).astype(np.float64)


def _unpacked(terms: Terms, slots: NDArray[np.int64]) -> Words:
    """The inverse of `_packed`, for sums."""
    bits, per, numbers = terms.bits, numbers_per_slot(terms.bits), terms.numbers
    half, count = 1 << (bits - 1), -(-terms.size // per)
    left, digits = slots[:count], np.empty((count, per), np.int64)
    for at in range(per):
        digits[:, at] = ((left + half) & (2 * half - 1)) - half
        left = (left - digits[:, at]) >> bits
    whole = np.concatenate([digits.reshape(-1)[: terms.size], slots[count:]])
    return numbers.reduced(whole.astype(numbers.dtype))


def _present(terms: Terms, sites: Sequence[str]) -> NDArray[np.float64]:
    return np.array([member in sites for member in terms.members], np.float64)


def _sizes(terms: Terms) -> list[int]:
    """Slots of each ciphertext."""
    packed = -(-terms.size // numbers_per_slot(terms.bits))
    whole = packed + terms.numbers.limbs + len(terms.members)
    return [min(SLOTS, whole - at) for at in range(0, whole, SLOTS)]


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _parted(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield data[at : at + length]
        at += length


def _vectors(context: Any, data: bytes, sizes: Sequence[int]) -> list[Any]:
    """Ciphertexts in a context, checked for their form; raises SecureError."""
    library, wanted = tenseal(), list(sizes)
    try:
        if len(data) > len(wanted) * _MOST_BYTES:
            raise ValueError(f"{len(data)} bytes are too many")
        vectors = [library.ckks_vector_from(context, part) for part in _parted(data)]
        parts = [part for vector in vectors for part in vector.ciphertext()]
        form = [(part.scale, part.size()) for part in parts]
        if [vector.size() for vector in vectors] != wanted or form != [(SCALE, 2)] * len(wanted):
            raise ValueError("they hold something else")
    except (RuntimeError, ValueError, struct.error) as error:
        raise SecureError(f"Expected {len(wanted)} ciphertexts of numbers, but: {error}.") from None
    return vectors
