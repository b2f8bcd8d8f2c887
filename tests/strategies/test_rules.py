"""The mean and clipping: worked numbers, equivariance, limits, sensitivity, a naive second mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from strategies import mixing
from strategies.cohort import Cohort, norm
from strategies.rules import clip, mean
from strategies.stage import Facts, Rule, chain
from tests.strategies.byzfl_oracle import oracle

SEEDS = st.integers(0, 2**31)
SITES = st.integers(1, 7)


def make(deltas: dict[str, Tensor], weights: dict[str, float] | None = None) -> Cohort:
    size = len(next(iter(deltas.values())))
    return Cohort.of(Layout(("w",), ((size,),)), torch.zeros(size), deltas, weights)


def draw(seed: int, count: int, size: int = 5) -> tuple[dict[str, Tensor], dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((count, size), generator=generator) * 10
    weights = torch.randint(1, 1000, (count,), generator=generator)
    names = [f"site-{i}" for i in range(count)]
    return dict(zip(names, values, strict=True)), dict(zip(names, weights.tolist(), strict=True))


def run(rule: Rule, cohort: Cohort) -> Tensor:
    return rule.apply(rule.init(cohort.layout.size), cohort, torch.Generator())[0].vector_D


def naive_mean(deltas: dict[str, Tensor], weights: dict[str, float]) -> list[float]:
    total = math.fsum(weights.values())
    columns = zip(*(delta.tolist() for delta in deltas.values()), strict=True)
    return [
        math.fsum(w * x for w, x in zip(weights.values(), column, strict=True)) / total
        for column in columns
    ]


def test_mean_worked_by_hand() -> None:
    deltas = {"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([0.0, 4.0])}
    assert run(mean(), make(deltas)).tolist() == [2.0, -2.0]
    assert run(mean(), make(deltas, {"a": 3, "b": 1})).tolist() == [3.0, -5.0]


@given(SEEDS, SITES)
def test_mean_agrees_with_a_naive_one(seed: int, count: int) -> None:
    deltas, weights = draw(seed, count)
    ours = run(mean(), make(deltas, weights)).tolist()
    assert ours == pytest.approx(naive_mean(deltas, weights), rel=1e-5, abs=1e-5)


@given(SEEDS, SITES, st.randoms(use_true_random=False))
def test_mean_does_not_see_the_order_of_arrival(seed: int, count: int, random: object) -> None:
    deltas, weights = draw(seed, count)
    names = list(deltas)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = make({n: deltas[n] for n in names}, {n: weights[n] for n in names})
    assert torch.equal(run(mean(), make(deltas, weights)), run(mean(), shuffled))


@given(SEEDS, SITES)
def test_mean_moves_with_a_translation(seed: int, count: int) -> None:
    deltas, weights = draw(seed, count)
    shift = draw(seed + 1, 1)[0]["site-0"]
    moved = run(mean(), make({n: d + shift for n, d in deltas.items()}, weights))
    expected = run(mean(), make(deltas, weights)) + shift
    assert torch.allclose(moved, expected, rtol=1e-5, atol=1e-4)


@given(SEEDS, SITES)
def test_mean_scales_by_a_power_of_two_to_the_bit(seed: int, count: int) -> None:
    deltas, weights = draw(seed, count)
    scaled = run(mean(), make({n: d * 4 for n, d in deltas.items()}, weights))
    assert torch.equal(scaled, run(mean(), make(deltas, weights)) * 4)


@given(SEEDS)
def test_mean_of_one_site_is_its_delta(seed: int) -> None:
    deltas, weights = draw(seed, 1)
    assert torch.equal(run(mean(), make(deltas, weights)), deltas["site-0"])


def test_mean_does_not_depend_on_blocks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weights = draw(0, 5, size=200_003)
    cohort = make(deltas, weights)
    before = torch.get_num_threads()
    found = []
    try:
        for threads, block in ((1, 1 << 18), (2, 1 << 18), (3, 99_991), (2, 7919)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(mixing, "_BLOCK", block)
            found.append(run(mean(), cohort))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_mean_leaves_its_input_alone() -> None:
    deltas, weights = draw(3, 3)
    copies = {name: delta.clone() for name, delta in deltas.items()}
    run(chain(clip(clip_norm=0.1), mean()), make(deltas, weights))
    assert all(torch.equal(deltas[name], copies[name]) for name in deltas)


def test_clip_worked_by_hand() -> None:
    cohort = make({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.3, 0.4])})
    clipped, _ = clip(clip_norm=1.0).apply({}, cohort, torch.Generator())
    assert clipped.rows[0].tolist() == pytest.approx([0.6, 0.8])
    assert torch.equal(clipped.rows[1], cohort.rows[1])
    assert clipped.clip == 1.0 and cohort.clip is None


@settings(max_examples=25, deadline=None)
@given(SEEDS, SITES, st.floats(0.01, 100.0))
def test_clip_agrees_with_byzfl(seed: int, count: int, bound: float) -> None:
    cohort = make(*draw(seed, count))
    clipped, _ = clip(clip_norm=bound).apply({}, cohort, torch.Generator())
    expected = oracle("Clipping", cohort.deltas_ND, c=bound)
    np.testing.assert_allclose(clipped.deltas_ND, expected, rtol=1e-5)


@given(SEEDS, SITES, st.floats(1e-6, 1e3))
def test_the_proved_bound_holds_exactly(seed: int, count: int, bound: float) -> None:
    deltas, weights = draw(seed, count, size=17)
    clipped, _ = clip(clip_norm=bound).apply({}, make(deltas, weights), torch.Generator())
    for name, row in zip(clipped.names, clipped.rows, strict=True):
        assert norm(row) <= bound
        assert norm(row) == pytest.approx(min(bound, norm(deltas[name])), rel=1e-6)
        # The direction is kept.
        cosine = torch.dot(row.double(), deltas[name].double()) / (norm(row) * norm(deltas[name]))
        assert float(cosine) == pytest.approx(1.0, abs=1e-6)


@given(SEEDS, SITES)
def test_infinite_clip_is_the_plain_mean(seed: int, count: int) -> None:
    deltas, weights = draw(seed, count)
    cohort = make(deltas, weights)
    loose, _ = clip(clip_norm=math.inf).apply({}, cohort, torch.Generator())
    assert loose.clip is None
    plain = run(mean(), cohort)
    assert torch.equal(run(chain(clip(clip_norm=math.inf), mean()), cohort), plain)


def test_the_tighter_of_two_bounds_is_kept() -> None:
    cohort = make({"a": torch.tensor([3.0, 4.0])})
    for first, second in ((1.0, 2.0), (2.0, 1.0)):
        once, _ = clip(clip_norm=first).apply({}, cohort, torch.Generator())
        twice, _ = clip(clip_norm=second).apply({}, once, torch.Generator())
        assert twice.clip == 1.0


def test_zero_update_is_clipped_without_dividing_by_zero() -> None:
    cohort = make({"a": torch.zeros(3)})
    assert run(chain(clip(clip_norm=1.0), mean()), cohort).tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=200)
@given(SEEDS, st.integers(1, 7), st.integers(0, 6), st.floats(0.01, 100))
def test_replacing_one_site_moves_the_clipped_mean_by_at_most_the_proved_bound(
    seed: int, count: int, chosen: int, bound: float
) -> None:
    deltas, weights = draw(seed, count)
    name = f"site-{chosen % count}"
    rule = chain(clip(clip_norm=bound), mean())
    cohort = make(deltas, weights)
    # The worst replacement points the other way.
    moved = make(deltas | {name: deltas[name] * -1000}, weights)
    facts = Facts(max_weight=float(cohort.weights_N.max()))
    proved = rule.sensitivity(facts)
    assert proved is not None
    change = norm(run(rule, cohort) - run(rule, moved))
    assert change <= proved * (1 + 1e-5)


def test_the_proved_bound_is_attained() -> None:
    rule = chain(clip(clip_norm=2.0), mean())
    there = make({"a": torch.tensor([9.0]), "b": torch.tensor([0.0])})
    back = make({"a": torch.tensor([-9.0]), "b": torch.tensor([0.0])})
    proved = rule.sensitivity(Facts(max_weight=0.5))
    assert proved == 2.0
    assert norm(run(rule, there) - run(rule, back)) == pytest.approx(proved, rel=1e-6)


def test_no_proof_without_a_clip_or_without_fixed_weights() -> None:
    assert mean().sensitivity(Facts(max_weight=0.5)) is None
    assert mean().sensitivity(Facts(clip=1.0)) is None
    assert chain(clip(clip_norm=math.inf), mean()).sensitivity(Facts(max_weight=0.5)) is None
    assert chain(clip(clip_norm=1.0), mean()).sensitivity(Facts()) is None
