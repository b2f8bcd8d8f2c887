"""Inner products: against float64 and dense products, close updates, huge ones, gauge, blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from strategies import geometry
from strategies.cohort import Cohort
from strategies.geometry import extended, gram, squared_distances
from tests.strategies.lora import LORA, lora_cohort, products

SEEDS = st.integers(0, 2**31)


def plain(rows_ND: Tensor) -> Cohort:
    layout = Layout(("w",), ((rows_ND.shape[1],),))
    deltas = {f"site-{i:03d}": row for i, row in enumerate(rows_ND)}
    return Cohort.of(layout, torch.zeros(layout.size), deltas)


@given(SEEDS, st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=25)
def test_inner_products_are_those_of_float64(seed: int, count: int, size: int) -> None:
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * 100
    wanted = rows.double() @ rows.double().T
    found = gram(plain(rows))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-9)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("held", [1, 4000, 1 << 28])
def test_blocks_of_rows_and_columns_leave_no_trace(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(150, 1500, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(geometry, "_HELD", held)
    torch.testing.assert_close(gram(plain(rows)), rows.double() @ rows.double().T)


def test_close_updates_of_a_large_model_keep_their_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(10_000, generator=generator)
    shared *= 20 / shared.norm()
    small = torch.randn(3, 10_000, generator=generator)
    small *= 0.01 / small.norm(dim=1, keepdim=True)
    rows = shared + small
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = squared_distances(gram(plain(rows)))
    torch.testing.assert_close(found.sqrt(), exact, rtol=1e-6, atol=0)
    expansion = rows @ rows.T  # what float32 makes of it: off by more than the distance itself
    lost = expansion.diagonal()[:, None] + expansion.diagonal() - 2 * expansion
    assert float((lost - exact.square()).abs().max()) > float(exact.square().max()) / 10


def test_a_huge_update_does_not_blur_the_distances_of_the_others() -> None:
    rows = torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
    without = squared_distances(gram(plain(rows)))
    attacked = torch.cat([rows, torch.full((1, 500), 1e30)])
    found = squared_distances(gram(plain(attacked)))
    assert torch.equal(found[:4, :4], without)
    assert bool((found[4, :4] > 1e60).all())


def test_equal_updates_are_at_distance_zero() -> None:
    row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    distances = squared_distances(gram(plain(row.expand(3, -1))))
    assert float(distances.max()) <= 1e-12 * float(row.norm() ** 2)
    assert bool((distances >= 0).all())


@given(SEEDS, st.sampled_from([1.0, 2.0, 0.5]))
@settings(max_examples=25)
def test_lora_updates_are_judged_by_their_products(seed: int, scale: float) -> None:
    cohort = lora_cohort(seed, 5, lora_scale=scale)
    dense = products(cohort)
    torch.testing.assert_close(gram(cohort), dense @ dense.T, rtol=1e-9, atol=1e-9)


@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=25)
def test_the_gauge_of_factors_changes_nothing(seed: int, k: float) -> None:
    cohort = lora_cohort(seed, 4)
    turned = lora_cohort(seed, 4, gauge=[1.0, -1.0, k, -k])
    # The factors that are sent are float32: what is lost grows with k and with the updates.
    largest = float(gram(cohort).diagonal().max())
    torch.testing.assert_close(gram(turned), gram(cohort), rtol=0, atol=1e-4 * largest)


def test_a_pure_change_of_gauge_is_no_update() -> None:
    base = torch.randn(LORA.size, generator=torch.Generator().manual_seed(0))
    flipped = {n: t * (-1 if "lora" in n else 1) for n, t in LORA.unflatten(base).items()}
    flip = LORA.flatten(flipped) - base
    assert float(flip.abs().max()) > 1
    cohort = Cohort.of(LORA, base, {"a": flip, "b": torch.zeros(LORA.size)})
    assert float(gram(cohort).abs().max()) < 1e-9


def test_many_sites_with_factors_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = lora_cohort(7, 6)
    whole = gram(cohort)
    cohort.memo.clear()
    monkeypatch.setattr(geometry, "_RANKS", 4)
    torch.testing.assert_close(gram(cohort), whole, rtol=1e-12, atol=1e-12)


def test_it_is_computed_once_for_all_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(4))
    cohort = plain(rows)
    first = gram(cohort)
    monkeypatch.setattr(geometry, "_inner", None)
    mix = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mixed = cohort.mixed(mix, ["x", "y", "z"], torch.ones(3) / 3)
    torch.testing.assert_close(gram(mixed), mix @ first @ mix.T)
    mixed_rows = mix @ rows.double()
    torch.testing.assert_close(gram(mixed), mixed_rows @ mixed_rows.T)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_extra_rows_are_added_to_what_is_known(kind: str) -> None:
    whole = lora_cohort(9, 5) if kind == "lora" else plain(torch.randn(5, 30))
    rows = list(whole.rows)
    fewer = Cohort.of(whole.layout, whole.base_D, dict(zip("abc", rows[:3], strict=True)))
    joined = extended(fewer, rows[3:])
    assert joined.names[:3] == ("a", "b", "c") and len(joined.names) == 5
    torch.testing.assert_close(gram(joined), gram(whole))
    half = torch.tensor([[0.5, 0.5, 0.0]])
    mixed = extended(fewer.mixed(half, ["m"], torch.ones(1)), rows[3:])
    mix = torch.block_diag(half, torch.eye(2)).double()
    torch.testing.assert_close(gram(mixed), mix @ gram(whole) @ mix.T)
    torch.testing.assert_close(mixed.rows[0], (rows[0] + rows[1]) / 2)
    assert torch.equal(mixed.rows[2], rows[4])
    assert mixed.weights_N.tolist() == [1.0, 0.0, 0.0]
