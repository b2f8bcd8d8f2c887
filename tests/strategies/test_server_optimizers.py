"""Server optimisers against numbers worked by hand, a scalar second implementation, and limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.layout import Layout
from strategies.cohort import Delta
from strategies.server_optimizers import adagrad, adam, momentum, none, yogi
from strategies.stage import Post

VALUES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


def steps(post: Post, deltas: list[float]) -> list[float]:
    """The step of each round for a model of one parameter."""
    layout = Layout(("w",), ((1,),))
    state, taken = post.init(1), []
    for value in deltas:
        given_D = torch.tensor([value])
        delta, state = post.apply(state, Delta(given_D, layout), torch.Generator())
        assert given_D.item() == value, "apply changed its input"
        taken.append(delta.vector_D.item())
    return taken


def reference(
    second: Callable[[float, float], float], deltas: list[float], *, rate: float, b1: float
) -> list[float]:
    """Algorithm 2 of Reddi et al. 2021 for one parameter, in float64, tau = 0.1."""
    m, v, taken = 0.0, 0.01, []
    for delta in deltas:
        m = b1 * m + (1 - b1) * delta
        v = second(v, delta * delta)
        taken.append(rate * m / (math.sqrt(v) + 0.1))
    return taken


def sign(value: float) -> float:
    return float((value > 0) - (value < 0))


def test_none_takes_the_delta_itself() -> None:
    assert steps(none(), [1.0, -2.0]) == [1.0, -2.0]
    assert none().init(4) == {}


def test_momentum_worked_by_hand() -> None:
    # m: 1, 1.5, -0.25
    assert steps(momentum(learning_rate=2.0, momentum=0.5), [1.0, 1.0, -1.0]) == [2.0, 3.0, -0.5]


def test_adam_worked_by_hand() -> None:
    # m = 0.5 * 3 = 1.5; v = 0.75 * 0.25 + 0.25 * 9 = 2.4375; 1.5 / (1.5612495 + 0.5)
    post = adam(learning_rate=1.0, momentum=0.5, beta2=0.75, tau=0.5)
    assert steps(post, [3.0]) == pytest.approx([1.5 / (math.sqrt(2.4375) + 0.5)])


def test_yogi_worked_by_hand() -> None:
    # v = 0.25 + 0.25 * 9 = 2.5, then 2.5 - 0.25 * 1 = 2.25
    post = yogi(learning_rate=1.0, momentum=0.0, beta2=0.75, tau=0.5)
    expected = [3 / (math.sqrt(2.5) + 0.5), 1 / (1.5 + 0.5)]
    assert steps(post, [3.0, 1.0]) == pytest.approx(expected)


def test_adagrad_worked_by_hand() -> None:
    # v = 9 + 0, then 9 + 16 = 25 with a negligible start
    post = adagrad(learning_rate=1.0, tau=1e-6)
    assert steps(post, [3.0, 4.0]) == pytest.approx([1.0, 0.8], rel=1e-5)


@given(VALUES)
def test_adaptive_ones_agree_with_a_scalar_implementation(deltas: list[float]) -> None:
    def check(post: Post, second: Callable[[float, float], float], b1: float) -> None:
        expected = reference(second, deltas, rate=0.5, b1=b1)
        assert steps(post, deltas) == pytest.approx(expected, rel=2e-3, abs=1e-4)

    settings = {"learning_rate": 0.5, "momentum": 0.9, "beta2": 0.9, "tau": 0.1}
    check(adam(**settings), lambda v, s: 0.9 * v + 0.1 * s, 0.9)
    check(adagrad(learning_rate=0.5, tau=0.1), lambda v, s: v + s, 0.0)


@given(VALUES)
def test_yogi_agrees_with_a_scalar_implementation(deltas: list[float]) -> None:
    post = yogi(learning_rate=0.5, momentum=0.9, beta2=0.9, tau=0.1)
    expected = reference(lambda v, s: v - 0.1 * s * sign(v - s), deltas, rate=0.5, b1=0.9)
    ours = steps(post, deltas)
    assert all(math.isfinite(step) for step in ours)
    # v and delta^2 may tie; then float32 and float64 may fall to different sides.
    if _ties(deltas) is False:
        assert ours == pytest.approx(expected, rel=2e-3, abs=1e-4)


def _ties(deltas: list[float]) -> bool:
    v = 0.01
    for delta in deltas:
        s = delta * delta
        if abs(v - s) <= 1e-4 * max(v, s):
            return True
        v = v - 0.1 * s * sign(v - s)
    return False


@given(VALUES)
def test_momentum_without_memory_is_none(deltas: list[float]) -> None:
    assert steps(momentum(learning_rate=1.0, momentum=0.0), deltas) == steps(none(), deltas)


@given(VALUES)
def test_huge_tau_makes_adam_a_scaled_momentum(deltas: list[float]) -> None:
    adaptive = adam(learning_rate=1e8, momentum=0.5, beta2=0.0, tau=1e8)
    # v starts at tau^2 and is forgotten at once, so only the floor is left: rate / tau = 1.
    halves = steps(momentum(learning_rate=0.5, momentum=0.5), deltas)
    assert steps(adaptive, deltas) == pytest.approx(halves, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("post", [momentum(), adam(), yogi(), adagrad()])
def test_state_is_float32_of_the_payloads_size(post: Post) -> None:
    state = post.init(3)
    assert "m" in state
    assert all(t.shape == (3,) and t.dtype == torch.float32 for t in state.values())


@pytest.mark.parametrize("post", [adam(), yogi(), adagrad()])
def test_a_zero_update_takes_no_step(post: Post) -> None:
    assert steps(post, [0.0, 0.0]) == [0.0, 0.0]
