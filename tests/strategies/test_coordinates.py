"""Median and trimmed mean: worked numbers, byzfl, equivariance, breakdown, LoRA, threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from strategies import coordinates
from strategies.cohort import Cohort, CohortError, Spool
from strategies.coordinates import median, trimmed_mean
from strategies.rules import clip
from strategies.stage import Rule, chain
from tests.strategies.byzfl_oracle import oracle

few = settings(max_examples=25)
SEEDS = st.integers(0, 2**31)


def make(rows_ND: Tensor, layout: Layout | None = None, base_D: Tensor | None = None) -> Cohort:
    size = rows_ND.shape[1]
    deltas = {f"site-{i:04d}": row for i, row in enumerate(rows_ND)}
    base_D = torch.zeros(size) if base_D is None else base_D
    return Cohort.of(layout or Layout(("w",), ((size,),)), base_D, deltas)


def run(rule: Rule, cohort: Cohort) -> Tensor:
    return rule.apply(rule.init(cohort.layout.size), cohort, torch.Generator())[0].vector_D


def normal(seed: int, count: int, size: int) -> Tensor:
    return torch.randn((count, size), generator=torch.Generator().manual_seed(seed)) * 10


def heavy(seed: int, count: int, size: int) -> Tensor:
    """Cauchy: no mean, and outliers of any size."""
    return normal(seed, count, size) / normal(seed + 1, count, size).abs().clamp(min=1e-6)


def tied(seed: int, count: int, size: int) -> Tensor:
    return normal(seed, count, size).div(10).round() * torch.tensor([1.0, -1.0]).repeat(size)[:size]


def degenerate(seed: int, count: int, size: int) -> Tensor:
    return torch.full((count, size), float(seed % 7) - 3.0)


INPUTS = pytest.mark.parametrize("draw", [normal, heavy, tied, degenerate])


def rules(count: int) -> list[Rule]:
    return [median(), trimmed_mean(num_byzantine=(count - 1) // 2), trimmed_mean(num_byzantine=0)]


def test_worked_by_hand() -> None:
    odd = make(torch.tensor([[1.0, 9.0], [2.0, 5.0], [30.0, -7.0]]))
    assert run(median(), odd).tolist() == [2.0, 5.0]
    even = make(torch.tensor([[1.0, 9.0], [4.0, 5.0], [30.0, -7.0], [2.0, 6.0]]))
    assert run(median(), even).tolist() == [3.0, 5.5]
    assert run(trimmed_mean(num_byzantine=1), even).tolist() == [3.0, 5.5]
    assert run(trimmed_mean(num_byzantine=0), odd).tolist() == pytest.approx([11.0, 7 / 3])


@INPUTS
# On both sides of the change from the network to sorting each coordinate.
@pytest.mark.parametrize("count", [1, 2, 5, 8, 15, 16, 17, 40])
def test_agree_with_byzfl(draw: Callable[[int, int, int], Tensor], count: int) -> None:
    rows_ND = draw(count, count, 50)
    ours = run(median(), make(rows_ND)).double().numpy()
    np.testing.assert_allclose(ours, oracle("Median", rows_ND), rtol=1e-6, atol=1e-30)
    for f in {0, 1, (count - 1) // 2} & set(range((count + 1) // 2)):
        ours = run(trimmed_mean(num_byzantine=f), make(rows_ND)).double().numpy()
        theirs = oracle("TrMean", rows_ND, f=f)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(rows_ND.abs().max()))


@few
@given(SEEDS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_the_order_of_the_sites_leaves_no_trace(seed: int, count: int, random: Any) -> None:
    rows_ND = tied(seed, count, 33)  # its zeros have both signs
    order = list(range(count))
    random.shuffle(order)
    for rule in rules(count):
        straight, shuffled = run(rule, make(rows_ND)), run(rule, make(rows_ND[order]))
        assert torch.equal(straight.view(torch.int32), shuffled.view(torch.int32))


@few
@given(SEEDS, st.integers(1, 20))
def test_they_move_and_scale_with_the_updates(seed: int, count: int) -> None:
    rows_ND, shift_D = normal(seed, count, 9), normal(seed + 1, 1, 9)[0]
    for rule in rules(count):
        still = run(rule, make(rows_ND))
        torch.testing.assert_close(run(rule, make(rows_ND + shift_D)), still + shift_D)
        assert torch.equal(run(rule, make(rows_ND * -4)), still * -4)


@few
@given(
    SEEDS,
    st.integers(0, 9),
    st.integers(1, 3),
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=27, max_size=27),
)
def test_whatever_f_liars_send_each_coordinate_stays_among_the_honest(
    seed: int, f: int, more: int, lies: list[float]
) -> None:
    honest = normal(seed, f + more, 3)
    rows_ND = torch.cat([honest, torch.tensor(lies).view(9, 3)[:f]])
    for rule in (median(), trimmed_mean(num_byzantine=f)):
        found = run(rule, make(rows_ND))
        assert bool((found >= honest.min(0).values).all() and (found <= honest.max(0).values).all())


def test_half_of_the_sites_break_the_median() -> None:
    rows_ND = torch.cat([torch.zeros(3, 1), torch.full((3, 1), 1e9)])
    assert run(median(), make(rows_ND)).item() == 5e8


def test_equal_and_huge_values_are_kept_to_the_bit() -> None:
    for value in (0.1, 3e38, -3e38, 1e-44):
        rows_ND = torch.full((6, 2), value)
        for rule in (median(), trimmed_mean(num_byzantine=1)):
            assert torch.equal(run(rule, make(rows_ND)), rows_ND[0])


@pytest.mark.parametrize("count", [7, 19])
def test_blocks_and_threads_leave_no_trace(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    cohort = make(normal(0, count, 20_011))
    before = torch.get_num_threads()
    found = []
    try:
        for threads, block in ((1, 1 << 25), (2, 1 << 25), (3, 100_003), (2, 7919)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(coordinates, "_MAPPED", block)
            monkeypatch.setattr(coordinates, "_CALL", block // 100)
            monkeypatch.setattr(coordinates, "_BLOCK", block // 10)
            found.append([run(rule, cohort) for rule in (median(), trimmed_mean(num_byzantine=2))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_weights_do_not_count_and_nothing_is_changed(tmp_path: Path) -> None:
    rows_ND = normal(5, 5, 100)
    with Spool(tmp_path) as spool:
        for index, row in enumerate(rows_ND):
            spool.put(f"site-{index}", row)
        layout = Layout(("w",), ((100,),))
        weights = {name: 10.0**index for index, name in enumerate(spool)}
        cohort = Cohort.of(layout, torch.zeros(100), spool, weights)
        assert torch.equal(run(median(), cohort), run(median(), make(rows_ND)))
        assert torch.equal(cohort.deltas_ND, rows_ND)


@few
@given(SEEDS, st.integers(1, 20), st.integers(1, 20))
def test_mixed_rows_are_those_that_the_cohort_gives(seed: int, count: int, made: int) -> None:
    cohort = make(normal(seed, count, 11))
    mix = torch.rand((made, count), generator=torch.Generator().manual_seed(seed))
    mix[:, 0] = 0.0  # a row that is not read
    names = [f"mix-{i:03d}" for i in range(made)]
    mixed = cohort.mixed(mix, names, torch.full((made,), 1 / made))
    for rule in rules(made):
        wanted = run(rule, make(mixed.deltas_ND))
        torch.testing.assert_close(run(rule, mixed), wanted, rtol=1e-5, atol=1e-4)


def test_after_clipping() -> None:
    rows_ND = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-300.0, 0.0]])
    clipped = run(chain(clip(clip_norm=1.0), median()), make(rows_ND))
    assert clipped.tolist() == pytest.approx([0.3, 0.4])


def test_too_few_sites_are_refused_with_the_remedy() -> None:
    with pytest.raises(CohortError, match=r"num-byzantine=2 to be at most 1 \(n=4 needs n ≥ 2f\+1"):
        run(trimmed_mean(num_byzantine=2), make(torch.ones(4, 1)))
    with pytest.raises(CohortError, match="at most 1"):
        trimmed_mean(num_byzantine=2).requires(4)
    assert trimmed_mean(num_byzantine=2).requires(5) == 5


LORA = Layout(("m.lora_A.weight", "m.lora_B.weight"), ((2, 3), (4, 2)))


def test_sites_that_drew_their_own_a_are_refused() -> None:
    rows_ND = normal(0, 3, LORA.size)
    with pytest.raises(
        CohortError, match=r"A drawn by 'site-0000' itself in 'm'.*geometric-median"
    ):
        run(median(), make(rows_ND, LORA))
    with pytest.raises(CohortError, match="trimmed-mean is meaningless"):
        run(trimmed_mean(num_byzantine=1), make(rows_ND, LORA))


def test_sites_that_start_from_one_a_are_not() -> None:
    rows_ND, base_D = normal(0, 3, LORA.size), torch.zeros(LORA.size)
    base_D[:6] = 1.0
    assert torch.equal(run(median(), make(rows_ND, LORA, base_D)), run(median(), make(rows_ND)))
    rows_ND[:, :6] = 0.0  # A is not trained
    assert torch.equal(run(median(), make(rows_ND, LORA)), run(median(), make(rows_ND)))


@pytest.mark.parametrize("count", range(1, 17))
def test_the_network_sorts(count: int) -> None:
    # Sorting every vector of zeros and ones is enough (Knuth, vol. 3, 5.3.4, theorem Z).
    words = np.arange(2 ** min(count, 12))
    rows = ((words >> np.arange(count)[:, None]) & 1).astype(np.float32)
    found = coordinates._by_network(rows.copy(), np.empty(rows.size, np.float32))
    assert np.array_equal(found, np.sort(rows, axis=0))
    assert math.isclose(float(found.sum()), float(rows.sum()))
