"""Centred clipping: by hand, against byzfl, its state, the bound on liars, products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import registry
from strategies.centered_clipping import centered_clipping
from strategies.cohort import Cohort
from strategies.stage import State
from tests.strategies.byzfl_oracle import aggregators, oracle
from tests.strategies.cohorts import apply, plain, result
from tests.strategies.inputs import KINDS, SEEDS, rows_of
from tests.strategies.lora import LORA, lora_cohort, update


def test_worked_by_hand() -> None:
    rule = centered_clipping(clip_radius=1.0, clip_iterations=1)
    cohort = plain([[0.5], [4.0], [0.0]])
    first, state = apply(rule, cohort)
    assert first.tolist() == [0.5]  # (0.5 + 1 + 0) / 3
    second, state = apply(rule, cohort, state)
    assert second.tolist() == pytest.approx([0.5 + (0.0 + 1.0 - 0.5) / 3])
    assert torch.equal(state["centre"], second) and set(state) == {"centre"}
    twice, _ = apply(centered_clipping(clip_radius=1.0, clip_iterations=2), cohort)
    torch.testing.assert_close(twice, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [0.1, 2.0, 1e6])
def test_it_agrees_with_byzfl_over_rounds(kind: str, radius: float) -> None:
    rule = centered_clipping(clip_radius=radius, clip_iterations=3)
    other = aggregators().CenteredClipping(L=3, tau=radius)
    state: State | None = None
    for round_ in range(3):
        rows = rows_of(kind, round_, 7)
        ours, state = apply(rule, plain(rows), state)
        expected = other(rows.double().numpy())
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_an_infinitely_wide_radius_is_the_mean() -> None:
    rows = rows_of("normal", 0, 5)
    expected = oracle("Average", rows)
    found = result(centered_clipping(clip_radius=1e9, clip_iterations=1), plain(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(SEEDS, st.sampled_from([1.0, -50.0, 1e4]), st.integers(1, 4))
@settings(max_examples=40)
def test_liars_move_it_by_no_more_than_the_documented_bound(
    seed: int, lie: float, steps: int
) -> None:
    rule = centered_clipping(clip_radius=0.5, clip_iterations=steps)
    honest = rows_of("normal", seed, 5)
    kept = torch.cat([honest, rows_of("normal", seed + 1, 2)])
    attacked = torch.cat([honest, honest[:2] * lie + lie])
    moved = (result(rule, plain(attacked)) - result(rule, plain(kept))).norm()
    assert float(moved) <= steps * 2 * 2 * 0.5 / 7 + 1e-5


def next_round(cohort: Cohort, delta: Tensor, seed: int) -> Cohort:
    """Sites of the next round, which start at the base that this round's delta leads to."""
    base = cohort.base_D + delta
    fresh = lora_cohort(seed, 4)
    rows = {n: r + fresh.base_D - base for n, r in zip(fresh.names, fresh.rows, strict=True)}
    return Cohort.of(LORA, base, rows)


@given(SEEDS, st.sampled_from([0.5, 5.0, 1e4]))
@settings(max_examples=20)
def test_with_factors_the_centre_is_what_the_last_round_added_to_the_products(
    seed: int, radius: float
) -> None:
    rule = centered_clipping(clip_radius=radius, clip_iterations=2)
    cohort = lora_cohort(seed, 4)
    delta, state = apply(rule, cohort)
    later = next_round(cohort, delta, seed + 1)
    v, before = update(cohort, delta), [update(later, row) for row in later.rows]
    for _ in range(2):
        apart = [x - v for x in before]
        v = v + sum(a * min(1.0, radius / float(a.norm())) for a in apart) / 4
    found, _ = apply(rule, later, state)
    new, base = LORA.unflatten(later.base_D + found), LORA.unflatten(later.base_D)
    at = 0
    for a, b, rank in (("x.q.lora_A.weight", "x.q.lora_B.weight", 2),
                       ("x.k.lora_A.weight", "x.k.lora_B.weight", 3)):  # fmt: skip
        start = base[b].double() @ base[a].double()
        whole = start + v[at : at + start.numel()].view_as(start)
        at += start.numel()
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = u[:, :rank] @ s[:rank].diag() @ vh[:rank]
        torch.testing.assert_close(new[b].double() @ new[a].double(), best, rtol=1e-2, atol=1e-2)
    head = (new["head.weight"] - base["head.weight"]).flatten().double()
    torch.testing.assert_close(head, v[at:], rtol=1e-3, atol=1e-3)


@given(SEEDS, st.permutations(range(5)))
@settings(max_examples=20)
def test_order_is_of_no_consequence_and_scale_goes_with_the_radius(
    seed: int, order: list[int]
) -> None:
    rows = rows_of("normal", seed, 5)
    found = result(centered_clipping(clip_radius=1.0), plain(rows))
    renamed = result(centered_clipping(clip_radius=1.0), plain(rows[order]))
    torch.testing.assert_close(renamed, found, rtol=1e-5, atol=1e-6)
    scaled = result(centered_clipping(clip_radius=4.0), plain(rows * 4))
    torch.testing.assert_close(scaled, found * 4, rtol=1e-6, atol=1e-6)


def test_after_mixing_it_clips_the_mixed_updates() -> None:
    rows = rows_of("normal", 9, 7)
    rule = registry.compose("centered-clipping", ["nnm"], options={"num_byzantine": 2})
    _, state = apply(rule, plain(rows))
    again, _ = apply(rule, plain(rows + 1), state)
    mixed = registry.PRE["nnm"](num_byzantine=2).apply({}, plain(rows + 1), torch.Generator())[0]
    own = {"centre": state["centered-clipping/centre"]}
    expected, _ = apply(centered_clipping(), plain(mixed.deltas_ND), own)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
