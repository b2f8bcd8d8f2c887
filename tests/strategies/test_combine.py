"""The end of a linear chain: weighted sums, products of factors, single sites, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import Layout
from models.section import ConfigError
from strategies import aggregate
from strategies.cohort import Cohort
from strategies.combine import combine, lora_svd
from strategies.rules import mean
from strategies.stage import Rule
from tests.strategies.lora import LORA, PAIRS, lora_cohort, products, update

SEEDS = st.integers(0, 2**31)


def run(rule: Rule, cohort: Cohort) -> torch.Tensor:
    return rule.apply({}, cohort, torch.Generator())[0].vector_D


def plain(seed: int, count: int) -> Cohort:
    layout = Layout(("w",), ((6,),))
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    deltas = {f"site-{i}": row for i, row in enumerate(values)}
    weights = {name: i + 1.0 for i, name in enumerate(deltas)}
    return Cohort.of(layout, torch.zeros(6), deltas, weights)


@given(SEEDS, st.integers(2, 6))
@settings(max_examples=25)
def test_without_factors_it_is_the_mean_to_the_bit(seed: int, count: int) -> None:
    cohort = plain(seed, count)
    assert torch.equal(run(combine(), cohort), run(mean(), cohort))


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=25)
def test_mixing_and_combining_is_one_sum(seed: int, count: int) -> None:
    cohort = plain(seed, count)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.rand(3, count, generator=generator, dtype=torch.float64)
    again = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75])
    mixed = cohort.mixed(mix, "abc", torch.ones(3) / 3).mixed(again, "xy", weights)
    wanted = weights.double() @ again @ mix @ cohort.deltas_ND.double()
    torch.testing.assert_close(run(combine(), mixed).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(mean(), mixed), run(combine(), mixed))


@given(SEEDS)
@settings(max_examples=25)
def test_products_of_full_rank_are_averaged_to_rounding(seed: int) -> None:
    cohort = lora_cohort(seed, 4)
    # Three of the sites are the base again: the mean of the products has the rank of one site
    # and of the base, which is what the payload's factors hold only where the base is zero.
    base = torch.zeros(LORA.size)
    single = Cohort(base, [cohort.rows[0], base, base], torch.ones(3) / 3, ("a", "b", "c"), LORA)
    wanted = products(single).mean(0)
    got = update(single, run(lora_svd(), single))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@given(SEEDS, st.integers(2, 5), st.floats(0.0, 1.0))
@settings(max_examples=25)
def test_each_pair_is_the_best_approximation_of_the_sum(
    seed: int, count: int, share: float
) -> None:
    cohort = lora_cohort(seed, count)
    mixed = cohort.mixed(torch.eye(count) * share)  # coefficients that sum to `share`
    new = LORA.unflatten(cohort.base_D + run(combine(), mixed))
    base = LORA.unflatten(cohort.base_D)
    sites = [LORA.unflatten(cohort.base_D + row) for row in cohort.rows]
    for a, b in PAIRS:
        start = base[b].double() @ base[a].double()
        whole = start + sum(
            w * share * (site[b].double() @ site[a].double() - start)
            for w, site in zip(cohort.weights_N.tolist(), sites, strict=True)
        )
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        rank = base[a].shape[0]
        best = u[:, :rank] @ s[:rank].diag() @ vh[:rank]
        torch.testing.assert_close(new[b].double() @ new[a].double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gauge", [-1.0, 1e3])
def test_one_site_with_all_the_weight_gives_its_product_and_not_its_choice_of_factors(
    gauge: float,
) -> None:
    plain, scaled = (lora_cohort(3, 3, gauge=(1.0, k)) for k in (1.0, gauge))
    mix, name, weight = torch.tensor([[0.0, 1.0, 0.0]]), ["site-001"], torch.ones(1)
    wanted, got = (run(combine(), cohort.mixed(mix, name, weight)) for cohort in (plain, scaled))
    torch.testing.assert_close(update(plain, wanted), products(plain)[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(update(plain, got), products(plain)[1], rtol=0, atol=1e-2)
    new = LORA.unflatten(scaled.base_D + got)
    for a, _ in PAIRS:  # orthonormal, where the site's own A was a thousand times as long
        torch.testing.assert_close(new[a] @ new[a].T, torch.eye(len(new[a])), rtol=0, atol=1e-3)


def test_no_weight_at_all_keeps_the_product_and_factors_that_can_learn() -> None:
    cohort = lora_cohort(4, 3)
    still = run(combine(), cohort.mixed(torch.zeros(3, 3)))
    torch.testing.assert_close(
        update(cohort, still), torch.zeros(7 * 5 + 5 * 6 + 12).double(), rtol=0, atol=1e-4
    )
    fresh = Cohort(torch.zeros(LORA.size), cohort.rows, cohort.weights_N, cohort.names, LORA)
    new = LORA.unflatten(run(combine(), fresh.mixed(torch.zeros(3, 3))))
    for a, b in PAIRS:  # were A zero too, no gradient could ever reach either
        assert float(new[b].abs().max()) == 0 and float(new[a].norm()) > 0


def test_lora_svd_without_factors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected LoRA factors .* set payload\.kind='lora'"):
        aggregate("lora-svd", {"w": torch.zeros(2)}, [{"w": torch.ones(2)}])


def test_lora_svd_by_name() -> None:
    cohort = lora_cohort(5, 3)
    base = LORA.unflatten(cohort.base_D)
    deltas = {name: LORA.unflatten(row) for name, row in zip("abc", cohort.rows, strict=True)}
    new = aggregate("lora-svd", base, deltas)
    wanted = sum((base["head.weight"] + deltas[name]["head.weight"]) / 3 for name in "abc")
    torch.testing.assert_close(new["head.weight"], wanted)
    a, _ = PAIRS[0]
    assert new[a].shape == (2, 5)
    torch.testing.assert_close(new[a] @ new[a].T, torch.eye(2), rtol=0, atol=1e-5)
