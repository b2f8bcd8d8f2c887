"""Krum, Multi-Krum and the geometric median: by hand, against byzfl, laws, breakdown, products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.section import ConfigError
from strategies import aggregate, registry
from strategies.cohort import Cohort, CohortError
from strategies.geometry import gram, squared_distances
from strategies.stage import Rule, chain
from strategies.weighers import krum, multi_krum
from tests.strategies.byzfl_oracle import oracle
from tests.strategies.cohorts import named, plain, prepared, result
from tests.strategies.inputs import KINDS, LIES, SEEDS, attacked, rows_of, spread
from tests.strategies.lora import LORA, lora_cohort, products, update

FEW = settings(max_examples=25)


def rule(name: str, *pre: str, **options: object) -> Rule:
    return registry.compose(name, pre, options=options)


def test_krum_worked_by_hand() -> None:
    # n=5, f=1: two neighbours. Sums of squares: a 1+4=5, b 1+1=2, c 1+4=5, d 25+36=61, e more.
    cohort = plain([[0.0], [1.0], [2.0], [7.0], [100.0]])
    assert prepared(krum(num_byzantine=1), cohort).names == ("site-001",)
    assert result(rule("krum"), cohort).tolist() == [1.0]
    assert result(rule("multi-krum", num_selected=3), cohort).tolist() == [1.0]
    assert result(rule("multi-krum"), cohort).tolist() == [2.5]  # all but the last


def test_ties_go_to_the_first_name() -> None:
    tied = [[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]]
    kept = prepared(multi_krum(num_byzantine=1, num_selected=2), plain([[1.0]] * 6))
    assert kept.names == ("site-000", "site-001")
    pairs = prepared(krum(num_byzantine=1), plain([*tied, [30.0], [31.0]]))
    assert pairs.names == ("site-002",)  # the middle four tie


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "liars"), [(5, 1), (9, 2), (12, 3), (30, 13)])
def test_krum_agrees_with_byzfl(kind: str, count: int, liars: int) -> None:
    rows = rows_of(kind, count, count)
    # byzfl counts N-f-1 neighbours, the paper N-f-2: its f is one larger for the same scores.
    expected = oracle("Krum", rows, f=liars + 1)
    ours = result(rule("krum", num_byzantine=liars), plain(rows))
    scores = sorted(_scores(rows, liars))
    if kind in ("normal", "cauchy") or scores[0] < scores[1]:
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    # Where scores tie, either choice is right: it must be as good as byzfl's.
    picked = [_scores(rows, liars)[_index(rows, row)] for row in (ours, torch.tensor(expected))]
    assert picked[0] == pytest.approx(picked[1], rel=1e-9)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "degenerate"])
@pytest.mark.parametrize(("count", "liars"), [(9, 2), (12, 3), (30, 13)])
def test_multi_krum_agrees_with_byzfl(kind: str, count: int, liars: int) -> None:
    rows = rows_of(kind, count + 1, count)
    expected = oracle("MultiKrum", rows, f=liars + 1)  # which also selects N - (f+1)
    selected = count - liars - 1
    ours = result(rule("multi-krum", num_byzantine=liars, num_selected=selected), plain(rows))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def _scores(rows: Tensor, liars: int) -> list[float]:
    squares = (rows.double()[:, None] - rows.double()).square().sum(2).sort(1).values
    return list(squares[:, 1 : len(rows) - liars - 1].sum(1).tolist())


def _index(rows: Tensor, row: Tensor) -> int:
    return int((rows - row.float()).square().sum(1).argmin())


@pytest.mark.parametrize("kind", KINDS)
def test_geometric_median_agrees_with_byzfl(kind: str) -> None:
    for count in (3, 8, 21):
        rows = rows_of(kind, count + 2, count)
        expected = oracle("GeometricMedian", rows, nu=1e-3, T=3000)
        found = result(rule("geometric-median", iterations=3000, smoothing=1e-3), plain(rows))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_geometric_median_worked_by_hand() -> None:
    line = plain([[0.0], [1.0], [50.0]])
    assert result(rule("geometric-median", iterations=500), line).item() == pytest.approx(
        1.0, abs=1e-3
    )
    corners = plain([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert result(rule("geometric-median"), corners).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_geometric_median_believes_no_weight() -> None:
    heavy = plain([[0.0], [1.0], [2.0]], {"site-000": 1, "site-001": 1, "site-002": 5})
    assert result(rule("geometric-median"), heavy).item() == pytest.approx(1.0, abs=1e-3)


def test_many_steps_find_a_minimum_of_the_distances() -> None:
    rows = rows_of("normal", 4, 9)
    found = result(rule("geometric-median", iterations=1000), plain(rows)).double()

    def total(point: Tensor) -> float:
        return float((rows.double() - point).norm(dim=1).sum())

    generator = torch.Generator().manual_seed(0)
    around = torch.randn(200, 6, generator=generator, dtype=torch.float64) * 0.05
    assert all(total(found + step) > total(found) - 1e-9 for step in around)


RULES = [("krum", {}), ("multi-krum", {}), ("geometric-median", {"smoothing": 1e-3})]


@pytest.mark.parametrize(("name", "options"), RULES)
@given(SEEDS, st.sampled_from(KINDS[:2]), st.permutations(range(7)))
@FEW
def test_names_and_order_are_of_no_consequence(
    name: str, options: dict[str, float], seed: int, kind: str, order: list[int]
) -> None:
    rows = rows_of(kind, seed, 7)
    straight = result(rule(name, **options), plain(rows))
    arrived = {n: named(rows)[n] for n in [f"site-{i:03d}" for i in order]}
    assert torch.equal(result(rule(name, **options), plain(arrived)), straight)
    renamed = result(rule(name, **options), plain(rows[order]))
    torch.testing.assert_close(renamed, straight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), RULES)
@given(SEEDS, st.floats(-100, 100, width=32))
@FEW
def test_it_moves_with_a_translation(
    name: str, options: dict[str, float], seed: int, shift: float
) -> None:
    rows = rows_of("normal", seed, 8)
    moved = result(rule(name, **options), plain(rows + shift))
    expected = result(rule(name, **options), plain(rows)) + shift
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@given(SEEDS)
@FEW
def test_it_scales_with_the_updates(name: str, seed: int) -> None:
    rows = rows_of("cauchy", seed, 8)
    scaled = result(rule(name), plain(rows * 4))
    assert torch.equal(scaled, result(rule(name), plain(rows)) * 4)


@given(SEEDS)
@FEW
def test_the_geometric_median_scales_with_updates_and_smoothing(seed: int) -> None:
    rows = rows_of("normal", seed, 8)
    scaled = result(rule("geometric-median", smoothing=4e-3), plain(rows * 4))
    plainly = result(rule("geometric-median", smoothing=1e-3), plain(rows))
    torch.testing.assert_close(scaled, plainly * 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@given(SEEDS, st.lists(LIES, min_size=2, max_size=2))
@settings(max_examples=50)
def test_liars_move_krum_by_no_more_than_the_documented_bound(
    name: str, seed: int, lies: list[float]
) -> None:
    honest = rows_of("normal", seed, 5)
    rows = attacked(honest, lies, seed)
    found = result(rule(name, num_byzantine=2), plain(rows)).double()
    bound = (7 - 2 - 2) ** 0.5 * spread(honest)
    near = (found - honest.double()).norm(dim=1)
    # Multi-Krum averages updates that are each that near to some honest one.
    assert float(near.min()) <= bound + (spread(honest) if name == "multi-krum" else 0) + 1e-4


@given(SEEDS, st.lists(LIES, min_size=3, max_size=3))
@settings(max_examples=50)
def test_liars_move_the_geometric_median_by_no_more_than_the_documented_bound(
    seed: int, lies: list[float]
) -> None:
    honest = rows_of("normal", seed, 7)
    rows = attacked(honest, lies, seed)
    found = result(rule("geometric-median"), plain(rows)).double()
    point = honest.double().mean(0)
    furthest = float((honest.double() - point).norm(dim=1).max())
    assert float((found - point).norm()) <= 2 * 0.7 / 0.4 * furthest + 1e-3


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median"])
@given(SEEDS, st.floats(0.1, 10))
@settings(max_examples=15)
def test_lora_updates_are_judged_by_their_products(name: str, seed: int, k: float) -> None:
    cohort = lora_cohort(seed, 6)
    turned = lora_cohort(seed, 6, gauge=[-1.0, 1.0, k, -k, 1.0, -1.0])
    options = {} if name == "geometric-median" else {"num_byzantine": 1}
    stage = registry.PRE[name](**options)
    kept, same = prepared(stage, cohort), prepared(stage, turned)
    assert kept.names == same.names
    torch.testing.assert_close(kept.weights_N, same.weights_N, rtol=1e-3, atol=1e-4)
    naive = plain(
        products(cohort).float(), dict(zip(cohort.names, cohort.weights_N.tolist(), strict=True))
    )
    assert prepared(stage, naive).names == kept.names
    one, other = (update(c, result(rule(name), c)) for c in (cohort, turned))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_copies_of_an_update_in_other_gauges_are_one_update() -> None:
    single = lora_cohort(0, 1)
    base = LORA.unflatten(single.base_D)
    new = LORA.unflatten(single.base_D + single.rows[0])
    copies = {}
    for k in (1.0, -1.0, 4.0, 0.25):
        turned = {n: t * (k if "_A" in n else 1 / k if "_B" in n else 1) for n, t in new.items()}
        copies[f"k={k}"] = LORA.flatten({n: t - base[n] for n, t in turned.items()})
    cohort = Cohort.of(LORA, single.base_D, copies)
    assert float(squared_distances(gram(cohort)).max()) < 1e-8
    apart = torch.cdist(cohort.deltas_ND, cohort.deltas_ND)  # which is what factor by factor sees
    assert float((apart + 100 * torch.eye(4)).min()) > 1


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_too_few_sites_say_what_to_do(name: str) -> None:
    wanted = r"num-byzantine=3 to be at most 2 \(n=8 needs n ≥ 2f\+3\); lower it or add sites"
    with pytest.raises(CohortError, match=wanted):
        result(rule(name, num_byzantine=3), plain(rows_of("normal", 0, 8)))
    with pytest.raises(CohortError, match=wanted):
        rule(name, num_byzantine=3).requires(8)
    assert rule(name, num_byzantine=2).requires(8) in (1, 6)


def test_more_selected_than_there_are() -> None:
    """Of N updates with f liars among them, N-f at most can all be honest."""
    cohort = plain(rows_of("normal", 0, 8))
    wanted = r"num-selected=7 to be at most 6 \(n=8 .*num-byzantine=2 may lie\); lower it"
    with pytest.raises(CohortError, match=wanted):
        result(rule("multi-krum", num_selected=7, num_byzantine=2), cohort)
    with pytest.raises(CohortError, match=wanted):
        rule("multi-krum", num_selected=7, num_byzantine=2).requires(8)
    assert rule("multi-krum", num_selected=6, num_byzantine=2).requires(8) == 6


@pytest.mark.parametrize("caught", [1, 2])
def test_fewer_are_selected_where_sites_were_caught(caught: int) -> None:
    stage = multi_krum(num_byzantine=2, num_selected=8)
    rows = rows_of("normal", 0, 10 - caught)
    with pytest.raises(CohortError, match=rf"num-selected=8 to be at most {8 - caught} "):
        prepared(stage, plain(rows))
    assert len(prepared(stage, replace(plain(rows), caught=caught)).names) == 8 - caught


@given(SEEDS, st.floats(-1e4, 1e4))
@settings(max_examples=20)
def test_as_many_as_may_be_selected_have_no_far_liar_among_them(seed: int, lie: float) -> None:
    rows = rows_of("normal", seed, 9)
    rows[:2] = 1e5 + lie
    chosen = prepared(multi_krum(num_byzantine=2, num_selected=7), plain(rows))
    assert chosen.names == tuple(f"site-{index:03d}" for index in range(2, 9))


def test_weights_do_not_make_krum_choose() -> None:
    rows = rows_of("normal", 1, 6)
    heavy = plain(rows, {f"site-{i:03d}": 10.0**i for i in range(6)})
    for name in ("krum", "multi-krum"):
        assert torch.equal(result(rule(name), heavy), result(rule(name), plain(rows)))


def test_choosing_before_another_rule() -> None:
    rows = rows_of("normal", 2, 8)
    first = result(rule("mean", "multi-krum"), plain(rows))
    assert torch.equal(first, result(rule("multi-krum"), plain(rows)))
    chained = chain(multi_krum(num_byzantine=1, num_selected=7), registry.RULES["krum"]())
    assert chained.requires(8) == 1


def test_by_name_without_flower() -> None:
    base = {"w": torch.zeros(1)}
    deltas = [{"w": torch.tensor([v])} for v in (0.0, 1.0, 2.0, 7.0, 100.0)]
    assert aggregate("krum", base, deltas, num_byzantine=1)["w"].tolist() == [1.0]
    with pytest.raises(ConfigError, match=r"'num_byzantin'. Did you mean 'num_byzantine'"):
        aggregate("krum", base, deltas, num_byzantin=1)
