"""Masks: pseudorandom words from a key, added to what is hidden and taken off again.

AES-256 in counter mode from block zero: each key makes one mask and is never used again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.secure.fixed_point import Words

_CHUNK = 1 << 16  # bytes: what lies between cipher and addition stays in the processor's cache
_BLOCK = 16


def shift(words: Words, keys: Iterable[tuple[bytes, int]]) -> None:
    """Add (sign 1) or subtract (sign -1) the mask of each 32-byte key, in place.

    Words wrap at their own width, which the caller reduces to the bits in use.
    """
    zeros, stream = bytes(_CHUNK), bytearray(_CHUNK + _BLOCK)
    count = _CHUNK // words.itemsize
    for key, sign in keys:
        cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(_BLOCK))).encryptor()
        for start in range(0, len(words), count):
            part = words[start : start + count]
            cipher.update_into(memoryview(zeros)[: part.nbytes], stream)
            mask = np.frombuffer(stream, words.dtype, len(part))
            (np.add if sign > 0 else np.subtract)(part, mask, out=part)


def keystream_rate(count: int) -> float:
    """Bytes of masks that a second of CPU time makes here; the best of three times `count`."""
    zeros, stream = bytes(_CHUNK), bytearray(_CHUNK + _BLOCK)
    best = 0.0
    for _ in range(3):
        cipher = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(_BLOCK))).encryptor()
        started = time.process_time()
        for _ in range(count // _CHUNK):
            cipher.update_into(zeros, stream)
        best = max(best, count / (time.process_time() - started))
    return best
