"""Shamir's shares: any threshold of them give the secret back, fewer say nothing."""

from __future__ import annotations

import os
import random
from collections import Counter
from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secure import shamir
from privacy.secure.shamir import PRIME, ShareError, combine, lagrange, split


def probably_prime(number: int, draws: int = 40) -> bool:
    """Miller and Rabin's test."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    chance = random.Random(1)
    for _ in range(draws):
        power = pow(chance.randrange(2, number - 1), odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def test_the_field_is_one_and_holds_every_secret() -> None:
    assert probably_prime(PRIME)
    assert not any(probably_prime(between) for between in range(2**256, PRIME))
    assert not probably_prime(PRIME * 7)


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.data())
def test_every_choice_of_enough_shares_gives_the_secret(
    secret: bytes, holders: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, holders))
    points = data.draw(
        st.lists(st.integers(1, 500), min_size=holders, max_size=holders, unique=True)
    )
    shares = split(secret, points, threshold)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine({point: shares[point] for point in chosen}) == secret
    assert combine(shares) == secret
    assert combine(shares, lagrange(points)) == secret


def test_one_share_too_few_gives_something_else() -> None:
    secret = os.urandom(32)
    shares = split(secret, range(1, 7), 5)
    for chosen in combinations(shares, 4):
        with suppress(ShareError):  # what lies outside the secrets is wrong as well
            assert combine({point: shares[point] for point in chosen}) != secret


def test_too_few_shares_fit_every_secret() -> None:
    """Two of three shares leave every value of a small secret equally possible."""
    shares = split(bytes(32), [1, 2, 3], 3)
    known = {point: int.from_bytes(shares[point]) for point in (1, 2)}
    for guess in range(50):
        # The polynomial of degree two through (0, guess) and both known shares exists.
        points = {0: guess, **known}
        at = 3
        value = 0
        for x, y in points.items():
            above = below = 1
            for other in points:
                if other != x:
                    above, below = above * (at - other), below * (x - other)
            value += y * above * pow(below, -1, PRIME)
        third = (value % PRIME).to_bytes(shamir.SHARE_BYTES)
        assert combine({1: shares[1], 2: shares[2], 3: third}) == guess.to_bytes(32)


def test_shares_of_one_secret_differ_each_time() -> None:
    seen = Counter(split(bytes(32), [1, 2], 2)[1][-1] for _ in range(300))
    assert len(seen) > 120  # of 256 values, some 177 are expected


@pytest.mark.parametrize(
    ("secret", "points", "threshold", "text"),
    [
        (b"short", [1, 2], 1, "Expected a secret of 32 bytes, got 5"),
        (bytes(32), [1, 2], 3, "Expected a threshold from 1 to 2 shares, got 3"),
        (bytes(32), [1, 2], 0, "Expected a threshold from 1 to 2 shares, got 0"),
        (bytes(32), [1, 1], 1, "Expected distinct points from 1"),
        (bytes(32), [0, 1], 1, "Expected distinct points from 1"),
    ],
)
def test_what_cannot_be_shared(secret: bytes, points: list[int], threshold: int, text: str) -> None:
    with pytest.raises(ShareError, match=text):
        split(secret, points, threshold)
