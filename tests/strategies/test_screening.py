"""Screening by module: what is found, what is left alone, LoRA, limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layout import Layout
from strategies.cohort import Cohort, CohortError
from strategies.screening import _norms, module_screen
from tests.strategies.lora import LORA, lora_cohort, products
from tests.strategies.test_coordinates import make

LAYOUT = Layout(("big", "small"), ((100, 100), (10,)))


def updates(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, LAYOUT.size), generator=generator)


def screened(cohort: Cohort, **options: float) -> Cohort:
    stage = module_screen(**options)  # type: ignore[arg-type]
    return stage.apply({}, cohort, torch.Generator())[0]


def test_an_attack_on_one_layer_is_found() -> None:
    rows_ND = updates(0, 8)
    rows_ND[3, -10:] *= 20
    whole = rows_ND.norm(dim=1)
    assert float(whole[3] / whole.median()) < 1.3  # the norm of the whole update gives nothing away
    kept = screened(make(rows_ND, LAYOUT))
    assert kept.names == tuple(f"site-{i:04d}" for i in range(8) if i != 3)
    assert torch.equal(kept.deltas_ND, rows_ND[[0, 1, 2, 4, 5, 6, 7]])
    assert kept.weights_N.tolist() == pytest.approx([1 / 7] * 7)
    assert set(kept.left_out) == {"site-0003"}
    assert kept.left_out["site-0003"].startswith("module-screen: its update of small is ")


def test_honest_updates_are_left_alone() -> None:
    for seed in range(20):
        cohort = make(updates(seed, 10), LAYOUT)
        kept = screened(cohort, num_byzantine=4)
        assert kept.rows is cohort.rows and torch.equal(kept.weights_N, cohort.weights_N)


def test_no_more_than_num_byzantine_are_left_out_and_the_worst_first() -> None:
    rows_ND = updates(1, 9)
    for site, factor in ((2, 30.0), (5, 300.0), (7, 3000.0)):
        rows_ND[site, -10:] *= factor
    cohort = make(rows_ND, LAYOUT)
    assert len(screened(cohort, num_byzantine=0).names) == 9
    assert set(cohort.names) - set(screened(cohort, num_byzantine=2).names) == {
        "site-0005",
        "site-0007",
    }
    assert len(screened(cohort, num_byzantine=4).names) == 6


def test_equal_and_zero_updates() -> None:
    same = make(torch.ones(5, LAYOUT.size), LAYOUT)
    assert screened(same).rows is same.rows and screened(same).names == same.names
    nothing = torch.zeros(5, LAYOUT.size)
    assert len(screened(make(nothing, LAYOUT)).names) == 5
    nothing[4, 0] = 1e-3
    assert "site-0004" not in screened(make(nothing, LAYOUT)).names


def test_lora_norms_are_those_of_the_products() -> None:
    plain, turned = lora_cohort(3, 6), lora_cohort(3, 6, gauge=[-1.0, 1.0, 5.0])
    modules, norms_NM = _norms(plain)
    assert modules == ["x.q", "x.k", "head.weight"]
    torch.testing.assert_close(norms_NM.square().sum(1).sqrt(), products(plain).norm(dim=1))
    torch.testing.assert_close(_norms(turned)[1], norms_NM, rtol=1e-4, atol=1e-5)
    assert LORA.names == plain.layout.names


def test_too_few_sites_are_refused_with_the_remedy() -> None:
    with pytest.raises(CohortError, match=r"num-byzantine=3 to be at most 2 \(n=6 needs n ≥ 2f\+1"):
        screened(make(updates(0, 6), LAYOUT), num_byzantine=3)
    assert module_screen(num_byzantine=2).requires(7) == 5
