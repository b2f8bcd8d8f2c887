"""Local training does the arithmetic it promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import attention
from models.batches import Batch, Batches
from models.config import TrainConfig
from models.evaluate import evaluate
from models.payload import Payload
from models.section import ConfigError
from models.train import Correction, TrainingError, train
from tests.models.unequal import PLAIN, UNEQUAL, batches_of, payload_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Bowls(nn.Module):
    """Loss: mean over centres y of (a / 2) * |w - y|^2, with the gradient a * (w - mean(y))."""

    def __init__(self, start: float, curvature: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))
        self.curvature = curvature

    def forward(self, labels: Tensor) -> SimpleNamespace:
        apart = self.w - labels.float()
        return SimpleNamespace(loss=self.curvature / 2 * apart.square().mean())


class Toy(nn.Module):
    """Loss: mean over labels y of sum_i w_i y, so that the gradient is mean(y) everywhere."""

    def __init__(self, values: Sequence[float], factor: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))
        self.factor = factor

    def forward(self, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.factor * self.w.sum() * labels.float().mean())


def toy_batch(*labels: float) -> Batch:
    values = torch.tensor(labels)
    return Batch({"labels": values}, len(labels), len(labels), len(labels), ())


def settings(**keys: Any) -> TrainConfig:
    return PLAIN.model_copy(update=keys)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_one_step_of_sgd_by_hand() -> None:
    payload = Payload("toy", Toy([2.0, -1.0]))
    outcome = train(payload, iter([toy_batch(1, 3)]), PLAIN, steps=1, learning_rate=0.1)
    assert payload.select()["w"].tolist() == pytest.approx([1.8, -1.2])  # gradient: (2, 2)
    assert outcome.loss == pytest.approx(2.0)
    assert (outcome.steps, outcome.tokens) == (1, 2)


def test_weight_decay_shrinks_by_hand() -> None:
    payload = Payload("toy", Toy([2.0, -1.0]))
    wanted = settings(weight_decay=0.5)
    train(payload, iter([toy_batch(2)]), wanted, steps=1, learning_rate=0.1)
    assert payload.select()["w"].tolist() == pytest.approx([2 * 0.95 - 0.2, -0.95 - 0.2])


def test_weight_decay_is_not_clipped_with_the_gradient() -> None:
    payload = Payload("toy", Toy([2.0, -1.0]))
    wanted = settings(weight_decay=0.5, max_grad_norm=1.0)
    train(payload, iter([toy_batch(2)]), wanted, steps=1, learning_rate=0.1)
    pull = 0.1 / math.sqrt(2)  # the gradient (2, 2) comes to the norm 1
    assert payload.select()["w"].tolist() == pytest.approx([1.9 - pull, -0.95 - pull], abs=1e-6)


def test_one_step_of_adamw_by_hand() -> None:
    payload = Payload("toy", Toy([2.0, -1.0]))
    wanted = settings(optimizer="adamw", weight_decay=0.5)
    train(payload, iter([toy_batch(-4)]), wanted, steps=1, learning_rate=0.1)
    # Its first step goes by the learning rate, whatever the gradient's size.
    assert payload.select()["w"].tolist() == pytest.approx([1.9 + 0.1, -0.95 + 0.1], abs=1e-6)


def test_the_optimizer_starts_fresh_in_every_call() -> None:
    payload = Payload("toy", Toy([0.0]))
    wanted = settings(optimizer="adamw")
    for size in (8.0, -1.0):  # momentum of the first would overrule the second
        train(payload, iter([toy_batch(size)]), wanted, steps=1, learning_rate=0.1)
    assert payload.select()["w"].tolist() == pytest.approx([0.0], abs=1e-6)


def test_the_toy_accumulates_by_hand() -> None:
    """Labels 1, 1, 1 and 5 have the mean 2, where the mean of the batches' means is 3."""
    payload = Payload("toy", Toy([0.0]))
    micro = iter([toy_batch(1, 1, 1), toy_batch(5)])
    train(payload, micro, settings(grad_accumulation=2), steps=1, learning_rate=1.0)
    assert payload.select()["w"].tolist() == pytest.approx([-2.0])


@pytest.mark.parametrize("kind", ["full", "lora", "soft-prompt"])
def test_accumulation_equals_one_large_batch(tiny_models: Mapping[str, Path], kind: str) -> None:
    assert [batch.counted for batch in batches_of(1)] == [19, 2, 1, 6]
    found = {}
    for size in (4, 2, 1):
        payload = payload_of(tiny_models["llama"], kind)
        wanted = settings(grad_accumulation=4 // size)
        outcome = train(payload, batches_of(size), wanted, steps=1, learning_rate=1.0)
        found[size] = payload.select()
        assert outcome.useful_tokens == 54
    assert distance(found[4], found[2]) < 2e-5
    assert distance(found[4], found[1]) < 2e-5
    # Means of means would be something else.
    payload = payload_of(tiny_models["llama"], kind)
    equal = (Batch(b.inputs, 1, b.tokens, b.useful, b.rows) for b in batches_of(1))
    train(payload, equal, settings(grad_accumulation=4), steps=1, learning_rate=1.0)
    assert distance(found[4], payload.select()) > 1e-3


def test_packed_and_padded_batches_train_alike(tiny_models: Mapping[str, Path]) -> None:
    found = []
    for packing in (False, True):
        payload = payload_of(tiny_models["llama"])
        if packing:
            assert attention.enable(payload.module)
        stream = Batches(UNEQUAL, batch_size=4, seed=0, pad_id=0, packing=packing, max_length=30)
        outcome = train(payload, stream.take(0, 1), PLAIN, steps=1, learning_rate=1.0)
        found.append(payload.select())
        assert outcome.useful_tokens == 54
    assert distance(*found) < 2e-5


def test_fedprox_follows_the_gradient_of_its_penalty(tiny_models: Mapping[str, Path]) -> None:
    mu, rate = 0.7, 0.2
    batches = list(batches_of(2)) * 2
    payload = payload_of(tiny_models["llama"], "lora")
    model = copy.deepcopy(payload.module).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    for batch in batches:
        penalty = sum(((w - s) ** 2).sum() for w, s in zip(weights, start, strict=True))
        loss = model(**batch.inputs).loss + mu / 2 * penalty
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=rate)
    plain = copy.deepcopy(payload)
    first = payload.select()
    train(payload, iter(batches), settings(prox_mu=mu), steps=4, learning_rate=rate)
    train(plain, iter(batches), PLAIN, steps=4, learning_rate=rate)
    expected = Payload("lora", model).select()
    assert distance(expected, payload.select()) < 1e-5
    assert distance(expected, plain.select()) > 1e-3
    assert sum(float((t - first[n]).norm()) for n, t in payload.select().items()) < sum(
        float((t - first[n]).norm()) for n, t in plain.select().items()
    )


def test_a_pull_stands_where_it_is_told_to() -> None:
    """With a gradient of 1 and lr 0.1: w - 0.1 (1 + 2 (w - 5)), by hand from w = 1."""
    payload = Payload("toy", Toy([1.0]))
    pull = Correction(2.0, {"w": torch.tensor([5.0])})
    batches = iter([toy_batch(1)] * 2)
    train(payload, batches, settings(prox_mu=9.0), steps=2, learning_rate=0.1, correction=pull)
    assert float(payload.select()["w"]) == pytest.approx(1.7 - 0.1 * (1 + 2 * (1.7 - 5)))


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_a_pull_ends_between_the_site_s_optimum_and_the_anchor(strength: float) -> None:
    """Ditto's minimum of (1 / 2)(v - 4)^2 + (lambda / 2) v^2 is 4 / (1 + lambda)."""
    payload = Payload("bowls", Bowls(1.0))
    pull = Correction(strength, {"w": torch.zeros(1)})
    train(payload, iter([toy_batch(4)] * 200), PLAIN, steps=200, learning_rate=0.1, correction=pull)
    assert float(payload.select()["w"]) == pytest.approx(4 / (1 + strength), rel=1e-5)


def test_a_shift_comes_after_clipping() -> None:
    payload = Payload("toy", Toy([0.0]))
    shift = Correction(shift={"w": torch.tensor([10.0]), "elsewhere": torch.ones(1)})
    keys = settings(max_grad_norm=1.0)
    train(payload, iter([toy_batch(5)]), keys, steps=1, learning_rate=0.1, correction=shift)
    assert float(payload.select()["w"]) == pytest.approx(-0.1 * (1 + 10), rel=1e-5)


def test_fedprox_pulls_on_what_is_shared_only() -> None:
    module = nn.ModuleDict()
    module.a, module.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    module.forward = lambda labels: SimpleNamespace(  # type: ignore[method-assign]
        loss=(module.a + module.b).sum() * labels.float().mean()
    )
    payload = Payload("toy", module, personal="b")
    batches = iter([toy_batch(1)] * 2)
    train(payload, batches, settings(prox_mu=1.0), steps=2, learning_rate=0.1)
    assert float(payload.select()["a"]) == pytest.approx(-0.1 - 0.1 * (1 - 0.1))
    assert float(payload.select_personal()["b"]) == pytest.approx(-0.2)


def test_without_penalty_fedprox_is_plain_training(tiny_models: Mapping[str, Path]) -> None:
    found = []
    for mu in (0.0, 1e-30):
        payload = payload_of(tiny_models["llama"], "lora")
        train(payload, batches_of(2), settings(prox_mu=mu), steps=2, learning_rate=0.1)
        found.append(payload.select())
    assert distance(*found) == 0


def test_training_lowers_the_loss(tiny_models: Mapping[str, Path]) -> None:
    payload = payload_of(tiny_models["llama"], "lora")
    wanted = TrainConfig(learning_rate=0.02)
    before = evaluate(payload, batches_of(4), wanted).loss
    stream = Batches(UNEQUAL, batch_size=4, seed=0, pad_id=0, packing=False, max_length=30)
    outcome = train(payload, stream.take(0, 15), wanted, steps=15, learning_rate=0.02)
    after = evaluate(payload, batches_of(4), wanted).loss
    assert after < outcome.loss < before


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_an_error_with_the_remedy(factor: float) -> None:
    payload = Payload("toy", Toy([1.0], factor))
    message = r"finite training loss, got (inf|nan) within 2 steps; lower train\.learning-rate"
    with pytest.raises(TrainingError, match=message):
        train(payload, iter([toy_batch(1)] * 2), PLAIN, steps=2, learning_rate=0.1)


def test_diverging_training_is_an_error(tiny_models: Mapping[str, Path]) -> None:
    payload = payload_of(tiny_models["llama"])
    with pytest.raises(TrainingError, match=r"lower train\.learning-rate"):
        train(payload, iter(list(batches_of(4)) * 4), PLAIN, steps=4, learning_rate=1e30)


@pytest.mark.parametrize(("model", "dropout"), [("llama", 0.0), ("gpt2", 0.3)])
def test_same_seed_same_bytes(tiny_models: Mapping[str, Path], model: str, dropout: float) -> None:
    def trained(seed: int) -> bytes:
        payload = payload_of(tiny_models[model], "lora", dropout=dropout)
        torch.rand(seed)  # what was drawn before does not matter
        state = torch.get_rng_state()
        stream = Batches(UNEQUAL, batch_size=2, seed=0, pad_id=0, packing=False, max_length=30)
        train(payload, stream.take(0, 3), TrainConfig(), steps=3, learning_rate=0.01, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return payload.layout.flatten(payload.select()).numpy().tobytes()

    assert trained(1) == trained(1)
    assert (trained(1) == trained(2)) == (dropout == 0)


def test_progress_is_told_at_the_end() -> None:
    told: list[tuple[int, int, float, float]] = []
    payload = Payload("toy", Toy([1.0]))
    train(
        payload, iter([toy_batch(1, 1)] * 3), PLAIN, steps=3, learning_rate=0.5,
        progress=lambda *news: told.append(news),
    )  # fmt: skip
    ((step, steps, loss, speed),) = told
    assert (step, steps) == (3, 3)
    assert loss == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert speed > 0


def test_progress_of_slow_steps_is_told_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("models.train.time.perf_counter", lambda: float(next(clock)))
    told: list[int] = []
    train(
        Payload("toy", Toy([1.0])), iter([toy_batch(1)] * 5), PLAIN, steps=5, learning_rate=0.1,
        progress=lambda step, *_: told.append(step),
    )  # fmt: skip
    assert told == [2, 4, 5]


def test_learning_rates_by_hand() -> None:
    def rates(rounds: int, **keys: Any) -> list[float]:
        config = settings(learning_rate=8.0, **keys)
        return [config.learning_rate_at(round_, rounds) for round_ in range(1, rounds + 1)]

    assert rates(3) == [8, 8, 8]
    assert rates(4, schedule="linear") == [8, 6, 4, 2]
    root = 4 * math.sqrt(2) / 2
    assert rates(4, schedule="cosine") == pytest.approx([8, 4 + root, 4, 4 - root])
    assert rates(4, warmup_rounds=3) == [2, 4, 6, 8]
    assert rates(5, warmup_rounds=1, schedule="linear") == [4, 8, 6, 4, 2]
    assert rates(2, warmup_rounds=3) == [2, 4]
    assert rates(1, schedule="cosine") == [8]


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0.0), (3, 1.0)])
def test_steps_or_epochs_but_not_both(steps: int, epochs: float) -> None:
    with pytest.raises(ConfigError, match=r"exactly one of train\.steps and train\.epochs"):
        TrainConfig(steps=steps, epochs=epochs).check()
