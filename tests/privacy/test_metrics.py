"""Scores with noise: what one record can change is bounded, and the noise fits the bound."""

from __future__ import annotations

import math

import pytest
import torch

from models.batches import eval_batches
from models.config import TrainConfig
from models.evaluate import Score, evaluate
from privacy.metrics import bounded, noised
from privacy.noise import seeded
from tests.privacy.conftest import Payloads, records
from tests.privacy.test_dpsgd import accepts

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig()


def test_sums_are_those_of_records(payload_of: Payloads) -> None:
    payload, examples = payload_of("lora", "bert", "classification"), records("classification", 6)
    exact = evaluate(payload, eval_batches(examples, 4, 0), CONFIG)
    each = [(at,) for at in range(6)]
    found = bounded(payload, eval_batches(examples, 4, 0), each, CONFIG, 100.0)
    assert found.loss_sum == pytest.approx(exact.loss_sum, rel=1e-5)
    assert (found.correct, found.rows, found.counted) == (exact.correct, 6, 6)


def test_no_record_moves_the_sums_by_more_than_its_bound(payload_of: Payloads) -> None:
    """A document in many chunks, or one whose loss is not a number, counts once as well."""
    payload, examples = payload_of("lora"), records("causal-lm", 6)
    with torch.no_grad():
        payload.module.get_input_embeddings().weight[299] = math.inf
    examples[2].input_ids[1] = 299
    groups = [(0, 1, 2), (3,), (4, 5)]

    def total(kept: list[tuple[int, ...]], bound: float) -> float:
        chosen = [at for group in kept for at in group]
        new = [tuple(chosen.index(at) for at in group) for group in kept]
        batches = eval_batches([examples[at] for at in chosen], 2, 0)
        return bounded(payload, batches, new, CONFIG, bound).loss_sum

    for bound in (0.5, 3.0, 100.0):
        whole = total(groups, bound)
        for left_out in range(3):
            rest = total([g for at, g in enumerate(groups) if at != left_out], bound)
            assert 0 < whole - rest <= bound * (1 + 1e-6)
    assert total(groups, 0.5) == pytest.approx(1.5)


def test_noise_fits_what_the_pair_can_change() -> None:
    rows, bound, sigma = 10**6, 4.0, 3.0
    source = seeded(2)
    score = Score(bound * rows / 2, rows, rows // 2, rows)
    drawn = [noised(score, bound, sigma, source) for _ in range(1500)]
    loss = torch.tensor([(one.loss_sum - score.loss_sum) / bound for one in drawn])
    right = torch.tensor([float(one.correct - score.correct) for one in drawn])
    for samples in (loss, right):
        assert accepts(samples.double(), math.sqrt(2) * sigma)
        assert not accepts(samples.double(), math.sqrt(2) * sigma * 2 / 3)
        assert not accepts(samples.double(), math.sqrt(2) * sigma * 3 / 2)
    assert abs(float((loss * right).mean())) < 4.5 * 2 * sigma**2 / math.sqrt(1500)


def test_impossible_figures_are_cut_off() -> None:
    source = seeded(3)
    for _ in range(20):
        found = noised(Score(1.0, 2, 1, 2), 1.0, 50.0, source)
        assert 0 <= found.loss_sum <= 2
        assert found.correct in (0, 1, 2)
        assert (found.counted, found.rows) == (2, 2)
