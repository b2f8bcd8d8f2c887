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


def fixed(cohort: Cohort, weight: float, without: str = "") -> Cohort:
    """The cohort with one weight for all, whoever takes part, and with one site left out."""
    kept = [i for i, name in enumerate(cohort.names) if name != without]
    rows = [cohort.rows[i] for i in kept]
    names = tuple(cohort.names[i] for i in kept)
    return Cohort(cohort.base_D, rows, torch.full((len(kept),), weight), names, cohort.layout)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(2, 30), st.integers(0, 29), st.floats(0.01, 100), st.floats(1e-3, 1))
def test_without_one_site_the_clipped_sum_moves_by_at_most_the_proved_bound(
    seed: int, count: int, chosen: int, bound: float, weight: float
) -> None:
    deltas, _ = draw(seed, count)
    cohort = make(deltas)
    rule = chain(clip(clip_norm=bound), mean())
    held = float(torch.tensor(weight))  # as float32
    proved = rule.sensitivity(Facts(max_weight=held, sites=count))
    assert proved is not None
    left_out = cohort.names[chosen % count]
    change = norm(
        run(rule, fixed(cohort, weight)).double()
        - run(rule, fixed(cohort, weight, left_out)).double()
    )
    assert change <= proved
    zeroed = make(deltas | {left_out: torch.zeros(5)})
    change = norm(
        run(rule, fixed(cohort, weight)).double() - run(rule, fixed(zeroed, weight)).double()
    )
    assert change <= proved


def test_the_proved_bound_is_attained_but_for_roundings() -> None:
    rule = chain(clip(clip_norm=2.0), mean())
    both = make({"a": torch.tensor([9.0]), "b": torch.tensor([0.0])})
    proved = rule.sensitivity(Facts(max_weight=0.5, sites=2))
    assert proved is not None
    moved = norm(run(rule, fixed(both, 0.5)) - run(rule, fixed(both, 0.5, "a")))
    assert moved <= proved <= 1.00001 * moved


def test_a_bound_without_roundings_would_be_false() -> None:
    """The control of the proof: many sites whose sum is rounded, and one that is left out."""
    names = [f"{i:04d}" for i in range(300)]
    deltas = {name: torch.full((1,), 1.0) for name in names}
    cohort = make(deltas)
    weight = float(torch.tensor(1 / 3))
    whole = float(run(mean(), fixed(cohort, weight)).double())
    less = float(run(mean(), fixed(cohort, weight, names[0])).double())
    proved = mean().sensitivity(Facts(clip=1.0, max_weight=weight, sites=300))
    assert proved is not None
    assert weight < whole - less <= proved


def test_no_proof_without_a_clip_fixed_weights_or_a_number_of_sites() -> None:
    assert mean().sensitivity(Facts(max_weight=0.5, sites=2)) is None
    assert mean().sensitivity(Facts(clip=1.0, sites=2)) is None
    assert mean().sensitivity(Facts(clip=1.0, max_weight=0.5)) is None
    unbounded = chain(clip(clip_norm=math.inf), mean())
    assert unbounded.sensitivity(Facts(max_weight=0.5, sites=2)) is None
    assert chain(clip(clip_norm=1.0), mean()).sensitivity(Facts()) is None


def test_a_round_of_nobody_is_a_mean_of_nothing() -> None:
    layout = Layout(("w",), ((3,),))
    assert run(mean(), Cohort.nobody(layout, torch.zeros(3))).tolist() == [0.0, 0.0, 0.0]
