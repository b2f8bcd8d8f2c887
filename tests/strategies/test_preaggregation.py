"""Nearest-neighbour mixing and bucketing: by hand, against byzfl, laws, breakdown, products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import registry
from strategies.cohort import CohortError
from strategies.geometry import gram
from strategies.preaggregation import bucketing, nnm
from tests.strategies.byzfl_oracle import oracle
from tests.strategies.cohorts import named, plain, prepared, result
from tests.strategies.inputs import LIES, SEEDS, attacked, rows_of, spread
from tests.strategies.lora import lora_cohort, products

FEW = settings(max_examples=25)


def test_nnm_worked_by_hand() -> None:
    mixed = prepared(
        nnm(num_byzantine=1), plain([[0.0], [3.0], [9.0]], {f"site-00{i}": i + 1 for i in range(3)})
    )
    assert mixed.deltas_ND.flatten().tolist() == [1.5, 1.5, 6.0]
    assert mixed.weights_N.tolist() == pytest.approx([1 / 3] * 3)
    # Ties go to the first name; a row is its own neighbour even among copies.
    tied = prepared(nnm(num_byzantine=1), plain([[0.0], [1.0], [2.0]]))
    assert tied.deltas_ND.flatten().tolist() == [0.5, 0.5, 1.5]
    copies = prepared(nnm(num_byzantine=2), plain([[1.0]] * 5))
    assert copies.matrix_NS.diagonal().tolist() == pytest.approx([1 / 3] * 5)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "degenerate"])
@pytest.mark.parametrize(("count", "liars"), [(3, 1), (9, 4), (30, 7)])
def test_nnm_agrees_with_byzfl(kind: str, count: int, liars: int) -> None:
    rows = rows_of(kind, count, count)
    expected = oracle("NNM", rows, f=liars)
    ours = prepared(nnm(num_byzantine=liars), plain(rows)).deltas_ND
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_mixed_without_liars_but_everything() -> None:
    rows = rows_of("normal", 0, 5)
    mixed = prepared(nnm(num_byzantine=0), plain(rows)).deltas_ND
    torch.testing.assert_close(mixed, rows.mean(0).expand(5, -1))


@given(SEEDS, st.lists(LIES, min_size=2, max_size=2))
@settings(max_examples=50)
def test_liars_move_an_honest_update_by_no_more_than_the_honest_spread(
    seed: int, lies: list[float]
) -> None:
    honest = rows_of("normal", seed, 5)
    mixed = prepared(nnm(num_byzantine=2), plain(attacked(honest, lies, seed))).deltas_ND[:5]
    moved = (mixed.double() - honest.double()).norm(dim=1)
    assert float(moved.max()) <= spread(honest) + 1e-4


@given(SEEDS, st.permutations(range(6)), st.floats(-100, 100, width=32))
@FEW
def test_nnm_moves_with_names_and_translation(seed: int, order: list[int], shift: float) -> None:
    rows = rows_of("normal", seed, 6)
    straight = prepared(nnm(num_byzantine=2), plain(rows)).deltas_ND
    renamed = prepared(nnm(num_byzantine=2), plain(rows[order])).deltas_ND
    torch.testing.assert_close(renamed, straight[order], rtol=1e-5, atol=1e-5)
    moved = prepared(nnm(num_byzantine=2), plain(rows + shift)).deltas_ND
    torch.testing.assert_close(moved, straight + shift, rtol=1e-4, atol=1e-4)


@given(SEEDS, st.floats(0.1, 10))
@FEW
def test_nnm_mixes_products_and_no_gauge_changes_them(seed: int, k: float) -> None:
    stage = nnm(num_byzantine=2)
    cohort = lora_cohort(seed, 6)
    mixed = prepared(stage, cohort)
    turned = prepared(stage, lora_cohort(seed, 6, gauge=[-1.0, 1.0, k, -k, 1.0, -1.0]))
    assert torch.equal(mixed.matrix_NS, turned.matrix_NS)
    torch.testing.assert_close(gram(turned), gram(mixed), rtol=1e-3, atol=1e-3)
    dense = prepared(stage, plain(products(cohort).float()))
    assert torch.equal(mixed.matrix_NS, dense.matrix_NS)
    torch.testing.assert_close(gram(mixed), gram(dense), rtol=1e-3, atol=1e-3)


def test_bucketing_worked_by_hand() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    mixed = prepared(bucketing(bucket_size=2), plain(rows))
    assert mixed.names == ("bucket-000000", "bucket-000001", "bucket-000002")
    sums = mixed.deltas_ND.flatten() * torch.tensor([2.0, 2.0, 1.0])
    # Every update is in one bucket: sums of distinct powers of two tell which.
    assert sums.sum().item() == 31 and all(float(s).is_integer() for s in sums)
    assert mixed.weights_N.tolist() == pytest.approx([1 / 3] * 3)
    assert torch.equal(mixed.matrix_NS.sum(1), torch.ones(3).double())


@given(SEEDS, st.integers(1, 9), st.integers(1, 5), st.permutations(range(9)))
@FEW
def test_buckets_depend_on_the_seed_and_on_names_not_on_arrival(
    seed: int, count: int, size: int, order: list[int]
) -> None:
    rows = rows_of("normal", seed, count)
    arrived = {n: named(rows)[n] for n in [f"site-{i:03d}" for i in order if i < count]}
    first = prepared(bucketing(bucket_size=size), plain(rows), seed).deltas_ND
    again = prepared(bucketing(bucket_size=size), plain(arrived), seed).deltas_ND
    assert torch.equal(first, again)
    assert len(first) == -(-count // size)


@pytest.mark.parametrize(("count", "size"), [(6, 2), (7, 3), (5, 1), (4, 4), (3, 9)])
def test_bucketing_agrees_with_byzfl_on_the_same_draw(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of("normal", count, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5)).numpy()
    # byzfl draws from numpy's global state, which cannot be told our order otherwise.
    monkeypatch.setattr(np.random, "permutation", lambda vectors: vectors[order])
    expected = oracle("Bucketing", rows, s=size)
    ours = prepared(bucketing(bucket_size=size), plain(rows), seed=5).deltas_ND
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_buckets_are_drawn_anew() -> None:
    rows = rows_of("normal", 0, 12)
    drawn = {
        tuple(prepared(bucketing(), plain(rows), seed).matrix_NS.argmax(1).tolist())
        for seed in range(20)
    }
    assert len(drawn) > 15


def test_buckets_of_one_are_a_permutation_and_of_all_the_mean() -> None:
    rows = rows_of("normal", 3, 6)
    single = prepared(bucketing(bucket_size=1), plain(rows)).deltas_ND
    assert sorted(single.tolist()) == sorted(rows.tolist())
    whole = prepared(bucketing(bucket_size=6), plain(rows)).deltas_ND
    torch.testing.assert_close(whole, rows.mean(0)[None])


def test_conditions_count_buckets() -> None:
    rule = registry.compose("krum", ["bucketing"], options={"num_byzantine": 1, "bucket_size": 2})
    assert rule.requires(9) == 1
    wanted = r"num-byzantine=1 to be at most 0 \(n=4 needs n ≥ 2f\+3\)"
    with pytest.raises(CohortError, match=wanted):
        rule.requires(8)
    with pytest.raises(CohortError, match=wanted):
        result(rule, plain(rows_of("normal", 0, 8)))
    with pytest.raises(CohortError, match=r"=3 to be at most 2 \(n=6 needs n ≥ 2f\+1\)"):
        prepared(nnm(num_byzantine=3), plain(rows_of("normal", 0, 6)))


def test_a_chain_of_linear_stages_is_one_sum_over_the_source() -> None:
    rows = rows_of("normal", 5, 9)
    options = {"num_byzantine": 1, "bucket_size": 2}
    rule = registry.compose("geometric-median", ["nnm", "bucketing"], options=options)
    cohort = plain(rows)
    mixed = prepared(bucketing(bucket_size=2), prepared(nnm(num_byzantine=1), cohort))
    assert mixed.source is cohort
    stepwise = plain(mixed.deltas_ND)
    wanted = result(registry.compose("geometric-median"), stepwise)
    torch.testing.assert_close(result(rule, cohort), wanted, rtol=1e-4, atol=1e-5)
