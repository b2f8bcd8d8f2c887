"""FedSA-LoRA as a pure function: A is the mean, B is nobody's but the site's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.section import ConfigError
from strategies import aggregate
from strategies.product import side
from strategies.registry import RULES
from strategies.rules import mean
from strategies.stage import Facts
from tests.strategies.lora import LORA, lora_cohort


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_b_stays_and_the_rest_is_the_mean(seed: int, count: int) -> None:
    cohort = lora_cohort(seed, count)
    base = LORA.unflatten(cohort.base_D)
    deltas = [LORA.unflatten(row) for row in cohort.rows]
    weights = cohort.weights_N.tolist()
    found = aggregate("lora-share-a", base, deltas, weights)
    averaged = aggregate("mean", base, deltas, weights)
    for name in LORA.names:
        kept = base if "lora_B" in name else averaged
        assert torch.equal(found[name], kept[name])


def test_a_alone_is_what_sites_send_in_a_run() -> None:
    base = {"q.lora_A.weight": torch.zeros(2, 3), "q.lora_embedding_A": torch.zeros(2)}
    ones = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    found = aggregate("lora-share-a", base, [ones, base])
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.5)) for tensor in found.values())


def test_a_payload_without_factors_is_refused() -> None:
    base = {"lora_Another.weight": torch.zeros(2), "q.lora_B.weight": torch.zeros(2)}
    with pytest.raises(
        ConfigError, match=r"Expected LoRA factors .*no factor A; .*payload\.kind='lora'"
    ):
        aggregate("lora-share-a", base, [base])


def test_it_is_no_more_sensitive_than_the_mean() -> None:
    facts = Facts(clip=2.0, max_weight=0.25, sites=4)
    ours = RULES["lora-share-a"]().sensitivity(facts)
    assert ours == mean().sensitivity(facts) == pytest.approx(0.5, rel=1e-5)


def test_factors_are_told_by_a_part_of_the_name() -> None:
    names = ("x.lora_A.weight", "x.lora_embedding_B", "lora_A_b.weight", "head.weight")
    assert [side(name) for name in names] == ["A", "B", "", ""]
