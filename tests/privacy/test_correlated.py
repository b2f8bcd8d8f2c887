"""Correlated noise: its cost by brute force, its gain over independent noise, its bands."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.section import ConfigError
from privacy.correlated import Correlated, plan

Matrix = NDArray[np.float64]


def matrix(noise: Correlated) -> Matrix:
    """C written out."""
    full = np.zeros((noise.rounds, noise.rounds))
    for row in range(noise.rounds):
        for column in range(max(0, row - noise.bands + 1), row + 1):
            full[row, column] = noise.coefficients[row - column]
    return full


SHAPES = [
    (rounds, period, bands)
    for rounds in (1, 4, 6, 7)
    for period in (1, 2, 3)
    for bands in (1, 2, 4)
    if bands <= rounds
]


@pytest.mark.parametrize(("rounds", "period", "bands"), SHAPES)
def test_no_site_moves_more_than_the_proof_allows(rounds: int, period: int, bands: int) -> None:
    """Every turn, every subset of turns, every sign: after k turns at most k * gain^2."""
    noise = Correlated(rounds, period, bands)
    factor = matrix(noise)
    largest = 0.0
    for slot in range(min(period, rounds)):
        turns = range(slot, rounds, period)
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=len(turns)):
            moved = np.zeros(rounds)
            moved[list(turns)] = signs
            squares = np.cumsum((factor @ moved) ** 2)
            taken = np.cumsum(moved != 0.0)  # turns charged when each round is released
            assert (squares <= taken * noise.gain**2 + 1e-9).all()
            largest = max(largest, float(squares[-1]))
    # The bound is no larger than it must be: all turns with one sign come close to it.
    assert largest <= noise.turns * noise.gain**2 + 1e-9
    if rounds % period == 0 and bands <= period:
        assert largest == pytest.approx(noise.turns * noise.gain**2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 1, 3), (9, 3, 5), (6, 2, 2)]))
def test_directions_of_many_dimensions_move_no_more(seed: int, shape: tuple[int, int, int]) -> None:
    noise = Correlated(*shape)
    generator = np.random.default_rng(seed)
    moved = np.zeros((noise.rounds, 4))
    turns = np.arange(seed % noise.period, noise.rounds, noise.period)
    drawn = generator.normal(size=(len(turns), 4))
    moved[turns] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    total = float(np.square(matrix(noise) @ moved).sum())
    assert total <= noise.turns * noise.gain**2 + 1e-9


def test_the_error_is_that_of_the_matrices() -> None:
    for noise in (Correlated(7, 2, 3), Correlated(5, 1, 1), Correlated(6, 6, 6)):
        sums = np.tril(np.ones((noise.rounds, noise.rounds)))
        noisy = sums @ np.linalg.inv(matrix(noise))
        expected = noise.gain * np.sqrt(np.square(noisy).sum() / noise.rounds)
        assert noise.error == pytest.approx(expected)


def test_the_square_root_of_the_prefix_sums() -> None:
    noise = Correlated(12, 12, 12)
    assert np.allclose(matrix(noise) @ matrix(noise), np.tril(np.ones((12, 12))))
    assert Correlated(4, 1, 1).coefficients.tolist() == [1.0]


def test_the_plan_picks_what_helps() -> None:
    assert plan(100, 1.0).bands == 1  # with a turn in every round no correlation does
    turns = plan(40, 0.25)
    assert (turns.period, turns.turns) == (4, 10) and turns.bands > 1
    assert turns.error < 0.7 * plan(40, 0.25, bands=1).error
    assert turns.error == min(plan(40, 0.25, bands=b).error for b in range(1, 33))
    assert plan(30, 0.3333, bands=2).period == 3


@pytest.mark.parametrize("rounds", [2, 5, 9])
def test_with_a_turn_in_every_round_a_diagonal_matrix_is_the_best(rounds: int) -> None:
    """First-order condition of min tr(A^T A X^-1) where the sum of |X_st| is the cost."""
    sums = np.tril(np.ones((rounds, rounds)))
    gram = sums.T @ sums
    best = np.diag(np.sqrt(np.diag(gram)))
    gradient = np.linalg.inv(best) @ gram @ np.linalg.inv(best)
    assert np.allclose(np.diag(gradient), 1.0)
    assert (np.abs(gradient) <= 1.0 + 1e-12).all()  # moving off the diagonal costs what it buys

    def error(x: Matrix) -> float:
        return float(np.trace(gram @ np.linalg.inv(x)) * np.abs(x).sum())

    generator = np.random.default_rng(rounds)
    for _ in range(50):
        root = np.tril(generator.normal(size=(rounds, rounds))) + 2 * np.eye(rounds)
        assert error(best) <= error(root.T @ root) * (1 + 1e-12)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one over a whole number .*such as 0.5, got 0.4"):
        plan(10, 0.4)
    with pytest.raises(ConfigError, match=r"bands of at most run.rounds=3, got 5"):
        plan(3, 0.5, bands=5)
