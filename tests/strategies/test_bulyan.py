"""Bulyan: worked numbers, a naive second implementation, equivariance, breakdown, LoRA."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.bulyan import _chosen, bulyan
from strategies.cohort import Cohort, CohortError
from strategies.geometry import gram, squared_distances
from tests.strategies.lora import LORA, lora_cohort
from tests.strategies.test_coordinates import degenerate, heavy, make, normal, run, tied

few = settings(max_examples=25)
SEEDS = st.integers(0, 2**31)


def naive(rows_ND: Tensor, f: int) -> list[float]:
    """The paper read line by line, in float64 and with loops."""
    rows = rows_ND.double()
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        neighbours = max(len(left) - f - 2, f + 1)

        def score(i: int, neighbours: int = neighbours) -> float:
            others = [float((rows[i] - rows[j]).square().sum()) for j in left if j != i]
            return sum(sorted(others)[:neighbours])

        best = min(left, key=score)
        left.remove(best)
        chosen.append(best)
    result = []
    for column in rows[chosen].T.tolist():
        middle = statistics.median(column)
        nearest = sorted(sorted(column), key=lambda x: abs(x - middle))
        result.append(statistics.fmean(nearest[: len(rows) - 4 * f]))
    return result


def test_worked_by_hand() -> None:
    # f=1 of 7. Krum chooses 3 (1+1+4+4), then 4 (1+4+6.25), 2 (1+9), 5 (2.25+16) and, of what is
    # left, 6.5, which is nearer to the liar than 1 is. The three nearest the median 4 are averaged.
    rows_ND = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.5], [1e6]])
    assert run(bulyan(num_byzantine=1), make(rows_ND)).item() == 4.0
    # The median 3.5 of four is nearest to 3 and 4: f=0 of 4 averages all.
    assert run(bulyan(num_byzantine=0), make(rows_ND[1:5])).item() == 3.5


@pytest.mark.parametrize("draw", [normal, heavy])
@pytest.mark.parametrize(("count", "f"), [(3, 0), (7, 1), (9, 1), (12, 2), (20, 4)])
def test_agrees_with_a_naive_one(draw: Any, count: int, f: int) -> None:
    rows_ND = draw(count + f, count, 6)
    found = run(bulyan(num_byzantine=f), make(rows_ND))
    assert found.tolist() == pytest.approx(naive(rows_ND, f), rel=1e-5, abs=1e-5)


@few
@given(SEEDS, st.sampled_from([(7, 1), (11, 2), (18, 3)]), st.randoms(use_true_random=False))
def test_order_translation_and_scale(seed: int, size: tuple[int, int], random: Any) -> None:
    count, f = size
    rows_ND, shift_D = normal(seed, count, 9), normal(seed + 1, 1, 9)[0]
    rule = bulyan(num_byzantine=f)
    still = run(rule, make(rows_ND))
    order = list(range(count))
    random.shuffle(order)
    torch.testing.assert_close(run(rule, make(rows_ND[order])), still)
    assert torch.equal(run(rule, make(rows_ND * 4)), still * 4)
    torch.testing.assert_close(run(rule, make(rows_ND + shift_D)), still + shift_D)


@pytest.mark.parametrize("draw", [tied, degenerate])
def test_equal_updates_are_no_trouble(draw: Any) -> None:
    rows_ND = draw(3, 11, 8)
    found = run(bulyan(num_byzantine=2), make(rows_ND))
    assert bool((found >= rows_ND.min(0).values).all() and (found <= rows_ND.max(0).values).all())
    same = rows_ND[:1].expand(11, 8).contiguous()
    assert torch.equal(run(bulyan(num_byzantine=2), make(same)), same[0] + 0.0)


@few
@given(
    SEEDS,
    st.integers(0, 3),
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=9, max_size=9),
)
def test_whatever_f_liars_send_stays_near_the_honest(seed: int, f: int, lies: list[float]) -> None:
    honest = normal(seed, 3 * f + 3, 3)
    rows_ND = torch.cat([honest, torch.tensor(lies).view(3, 3)[:f]])
    found = run(bulyan(num_byzantine=f), make(rows_ND))
    low, high = honest.min(0).values, honest.max(0).values
    assert bool((found >= low - (high - low)).all() and (found <= high + (high - low)).all())


def test_too_few_sites_are_refused_with_the_remedy() -> None:
    with pytest.raises(CohortError, match=r"num-byzantine=2 to be at most 1 \(n=10 needs n ≥ 4f"):
        run(bulyan(num_byzantine=2), make(torch.ones(10, 1)))
    assert bulyan(num_byzantine=2).requires(11) == 11


def test_lora_updates_are_chosen_by_their_products() -> None:
    plain, turned = lora_cohort(1, 7), lora_cohort(1, 7, gauge=[-1.0, 3.0, 0.25])
    assert not torch.equal(plain.deltas_ND, turned.deltas_ND)
    chosen = [_chosen(squared_distances(gram(c)).numpy(), 1, 5) for c in (plain, turned)]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 5
    indices = sorted(chosen[0])
    picked = torch.stack([plain.rows[i] for i in indices])
    expected = trimmed(picked)
    torch.testing.assert_close(run(bulyan(num_byzantine=1), plain), expected)


def trimmed(picked: Tensor) -> Tensor:
    """Mean of the three of five values that are nearest the median, by sorting distances."""
    median = picked.median(dim=0).values
    near = (picked - median).abs().argsort(dim=0)[:3]
    return picked.gather(0, near).mean(0)


def test_a_that_each_site_drew_is_refused() -> None:
    plain = lora_cohort(1, 7)
    drawn = Cohort(torch.zeros(LORA.size), plain.rows, plain.weights_N, plain.names, LORA)
    with pytest.raises(CohortError, match="bulyan is meaningless"):
        run(bulyan(num_byzantine=1), drawn)
