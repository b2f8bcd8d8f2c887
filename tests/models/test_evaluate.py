"""Scores are those of a naive loop, and add up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from models.config import TrainConfig
from models.evaluate import Score, evaluate, rank
from models.payload import Payload
from models.text import IGNORED, Causal, Classified, Ranked
from models.train import train
from tests.models.unequal import PLAIN, UNEQUAL, batches_of, example, payload_of

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def naive_loss(payload: Payload, rows: Sequence[Causal]) -> tuple[float, int]:
    """Sum of the loss over labels, row by row without padding, and the number of labels."""
    total, count = 0.0, 0
    payload.module.eval()
    for row in rows:
        logits = payload.module(
            input_ids=row.input_ids[None], attention_mask=torch.ones(1, len(row.input_ids))
        ).logits[0, -len(row.input_ids) :]
        for at in range(1, len(row.labels)):
            if row.labels[at] != IGNORED:
                total -= float(logits[at - 1].log_softmax(-1)[row.labels[at]])
                count += 1
    return total, count


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix", "adapter", "full"])
def test_the_score_equals_a_naive_loop(tiny_models: Mapping[str, Path], kind: str) -> None:
    payload = payload_of(tiny_models["llama"], kind)
    payload.load({n: t + 0.05 for n, t in payload.select().items()})
    total, count = naive_loss(payload, UNEQUAL)
    score = evaluate(payload, batches_of(3), PLAIN)
    assert (score.counted, score.rows, count) == (28, 4, 28)
    assert score.loss_sum == pytest.approx(total, rel=1e-4)
    assert score.loss == pytest.approx(total / count, rel=1e-4)
    assert score.metric("perplexity") == pytest.approx(math.exp(total / count), rel=1e-3)


def test_scores_of_splits_add_up(tiny_models: Mapping[str, Path]) -> None:
    payload = payload_of(tiny_models["gpt2"], "lora")
    whole = evaluate(payload, batches_of(4), PLAIN)
    parts = [evaluate(payload, batches_of(2, rows), PLAIN) for rows in (UNEQUAL[:1], UNEQUAL[1:])]
    total = sum(parts, Score())
    assert (total.counted, total.correct, total.rows) == (whole.counted, whole.correct, whole.rows)
    assert total.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)


def test_an_empty_score_is_not_a_number() -> None:
    empty = Score()
    values = [empty.loss, empty.metric("perplexity"), empty.metric("accuracy")]
    assert all(math.isnan(value) for value in values)
    assert Score(800.0, 1, 0, 1).metric("perplexity") == math.exp(700)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_accuracy_of_classes_equals_a_naive_loop(
    tiny_models: Mapping[str, Path], model: str
) -> None:
    payload = payload_of(tiny_models[model], "lora", task="classification", rank=8, alpha=16.0)
    rows = [
        Classified(example(length, 1, length).input_ids, None, length % 3)
        for length in (4, 9, 5, 12, 7, 6, 11)
    ]
    right, total = 0, 0.0
    payload.module.eval()
    with torch.no_grad():
        for row in rows:
            logits = payload.module(input_ids=row.input_ids[None]).logits[0]
            right += int(logits.argmax()) == row.label
            total += float(functional.cross_entropy(logits, torch.tensor(row.label)))
    score = evaluate(payload, batches_of(3, rows), PLAIN)
    assert (score.correct, score.rows, score.counted) == (right, 7, 7)
    assert score.loss_sum == pytest.approx(total, rel=1e-4)
    assert score.metric("accuracy") == right / 7
    wanted = TrainConfig(optimizer="adamw")
    train(payload, iter(list(batches_of(7, rows)) * 60), wanted, steps=60, learning_rate=0.02)
    learnt = evaluate(payload, batches_of(3, rows), wanted)
    assert learnt.loss < 0.7 * score.loss
    assert learnt.correct > score.correct


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix"])
def test_choices_are_ranked_as_in_a_naive_loop(tiny_models: Mapping[str, Path], kind: str) -> None:
    payload = payload_of(tiny_models["llama"], kind)
    ranked, best = [], []
    for row in range(12):
        prompt = example(4 + row, 1, row).input_ids
        candidates = []
        for answer in range(3):
            # Mostly of one length, or the shortest answer would always come first.
            length = 2 + row % 2 if row % 3 else 1 + (answer + row) % 3
            ids = torch.cat([prompt, example(length, 1, 50 * row + answer).input_ids])
            labels = ids.clone()
            labels[: len(prompt)] = IGNORED
            candidates.append(Causal(ids, labels))
        losses = [naive_loss(payload, [candidate])[0] for candidate in candidates]
        best.append(min(range(3), key=losses.__getitem__))
        ranked.append(Ranked(tuple(candidates), row % 3))
    expected = sum(best[row] == row % 3 for row in range(12))
    assert rank(payload, ranked, PLAIN, 4, 0) == expected
    right = [Ranked(row.candidates, at) for row, at in zip(ranked, best, strict=True)]
    assert rank(payload, right, PLAIN, 5, 0) == 12
    wrong = [Ranked(row.candidates, (at + 1) % 3) for row, at in zip(ranked, best, strict=True)]
    assert rank(payload, wrong, PLAIN, 5, 0) == 0
    assert rank(payload, [], PLAIN, 5, 0) == 0
