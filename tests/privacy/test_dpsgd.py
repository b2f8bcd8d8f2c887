"""DP-SGD: sums of clipped gradients as a naive loop has them, bounded, noised, reproducible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.batches import Batches
from models.config import TrainConfig
from models.payload import Payload
from models.text import Causal, Example
from models.train import Correction, Trained, TrainingError
from models.train import train as train_plainly
from privacy.dpsgd import Mechanism, clipped_sum, train
from privacy.noise import seeded
from privacy.persample import attached, trained
from privacy.selfcheck import METHODS
from tests.privacy.conftest import Payloads, batches_of, records
from tests.privacy.test_selfcheck import EXACT

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = TrainConfig(optimizer="sgd", max_grad_norm=0.0)
NO_CLIP = 1e9


def gradients(payload: Payload, record: Example) -> dict[str, Tensor]:
    """Of one record, by the model's own loss."""
    inputs = {"input_ids": record.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    labels = record.labels[None] if isinstance(record, Causal) else torch.tensor([record.label])
    payload.module.train()
    loss = payload.module(**inputs, labels=labels).loss
    parameters = trained(payload)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def summed(
    payload: Payload,
    method: str,
    examples: list[Example],
    clip: float,
    precision: str = "float32",
) -> dict[str, Tensor]:
    payload.module.train()
    with attached(payload, METHODS[method], precision) as attached_method:
        batches = batches_of(examples) if examples else None
        rows = range(len(examples))
        physical = list(batches.of_rows(rows, attached_method.physical)) if batches else []
        return clipped_sum(payload, attached_method, physical, clip)[0]


@pytest.mark.parametrize("case", list(EXACT), ids=" ".join)
def test_clipped_sums_equal_a_naive_loop(payload_of: Payloads, case: tuple[str, str, str]) -> None:
    payload, examples = payload_of(*case), records(case[2])
    alone = [gradients(payload, example) for example in examples]
    clip = sorted(norm(found) for found in alone)[2]  # some are clipped, some are not
    bound = clip * (1 - 1e-3)
    expected = {
        name: sum(min(1.0, bound / norm(found)) * found[name] for found in alone)
        for name in alone[0]
    }
    for method in EXACT[case]:
        found = summed(payload, method, examples, clip)
        apart = norm({name: found[name] - expected[name] for name in expected})
        assert apart < 2e-4 * norm(expected)


def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(payload_of: Payloads) -> None:
    """Zeroed out: by C. Changed to another one: by 2 C. Whatever the others are."""
    payloads = {kind: payload_of(kind) for kind in ("lora", "full")}
    start = {kind: payload.select() for kind, payload in payloads.items()}

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def moved(data: st.DataObject) -> None:
        _moved_by_one(payloads, start, data)

    moved()


def _moved_by_one(
    payloads: Mapping[str, Payload],
    start: Mapping[str, Mapping[str, Tensor]],
    data: st.DataObject,
) -> None:
    kind, method, precision = data.draw(
        st.sampled_from([
            ("lora", "ghost", "float32"), ("lora", "hooks", "float32"),
            ("full", "ghost", "float32"),
            # Only alone: in a batch, products of so few bits round by who else is in it.
            ("lora", "microbatch", "bfloat16"),
        ])
    )  # fmt: skip
    clip = data.draw(st.sampled_from([1e-6, 1e-2, 1.0, 50.0]))
    examples = records("causal-lm", data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99)))
    at = data.draw(st.integers(0, len(examples) - 1))
    other = records("causal-lm", 6, 1234)[data.draw(st.integers(0, 5))]
    payload = payloads[kind]
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    payload.load({name: scale * tensor for name, tensor in start[kind].items()})
    one, left = examples[at], (examples[:at], examples[at + 1 :])
    whole, without, changed = (
        summed(payload, method, [*left[0], *between, *left[1]], clip, precision)
        for between in ([one], [], [other])
    )
    assert norm({n: whole[n] - without[n] for n in whole}) <= clip
    assert norm({n: whole[n] - changed[n] for n in whole}) <= 2 * clip


def test_a_record_in_chunks_is_one_record(payload_of: Payloads) -> None:
    """All three chunks of the only record together move the weights by C over the one expected."""
    payload, clip = payload_of("lora"), 1e-3
    examples = records("causal-lm", 3)
    stream = Batches(
        examples,
        batch_size=2,
        seed=0,
        pad_id=0,
        packing=False,
        max_length=64,
        by_record=[[0, 1, 2]],
    )
    start = weights(payload)
    mechanism = Mechanism(clip, 0.0, 1.0, "ghost")
    outcome = train(payload, stream, SGD, mechanism, seeded(1), steps=8, learning_rate=1.0)
    assert outcome.useful_tokens in {4 * a + 7 * b + 10 * (8 - a - b)
                                     for a in range(1, 7) for b in range(1, 8 - a)}  # fmt: skip
    assert 0.5 * 8 * clip < float((weights(payload) - start).norm()) <= 8 * clip


def test_a_bound_that_is_not_kept_would_be_seen(payload_of: Payloads) -> None:
    """The same gradients unclipped move the sum by more than the norm of the test above."""
    payload, examples = payload_of("lora"), records("causal-lm", 3)
    whole = summed(payload, "ghost", examples, NO_CLIP)
    without = summed(payload, "ghost", examples[:2], NO_CLIP)
    assert norm({n: whole[n] - without[n] for n in whole}) > 1e-2


def test_a_record_without_a_finite_gradient_counts_as_nothing(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    with torch.no_grad():
        payload.module.get_input_embeddings().weight[299] = math.inf
    good = records("causal-lm", 3)
    bad = Causal(torch.tensor([5, 299, 6]), torch.tensor([-100, 299, 6]))
    expected = summed(payload, "microbatch", good, 1.0)
    for method in METHODS:
        found = summed(payload, method, [good[0], bad, *good[1:]], 1.0)
        assert norm({n: found[n] - expected[n] for n in found}) < 1e-4
        assert norm(summed(payload, method, [bad], 1.0)) == 0.0


def run(
    payload: Payload,
    examples: list[Example],
    *,
    noise: float = 0.0,
    clip: float = NO_CLIP,
    rate: float = 1.0,
    seed: int = 0,
    steps: int = 1,
    rate_of_learning: float = 1.0,
    config: TrainConfig = SGD,
    **keys: Any,
) -> Trained:
    mechanism = Mechanism(clip, noise, rate, "ghost")
    return train(
        payload, batches_of(examples), config, mechanism, seeded(seed), steps=steps,
        learning_rate=rate_of_learning, **keys,
    )  # fmt: skip


def weights(payload: Payload) -> Tensor:
    return payload.layout.flatten(payload.select())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_noise_and_clipping_it_is_plain_training(
    payload_of: Payloads, optimizer: str
) -> None:
    examples = records("classification", 5)
    config = TrainConfig(optimizer=optimizer, max_grad_norm=0.0, weight_decay=0.1, prox_mu=0.3)
    found = []
    for private in (False, True):
        payload = payload_of("lora", "bert", "classification")
        if private:
            run(payload, examples, steps=3, rate_of_learning=0.05, config=config)
        else:
            stream = batches_of(examples, 5)
            whole = (batch for _ in range(3) for batch in stream.of_rows(range(5)))
            train_plainly(payload, whole, config, steps=3, learning_rate=0.05)
        found.append(weights(payload))
    assert float((found[0] - found[1]).abs().max()) < 2e-5
    assert (
        float((found[0] - weights(payload_of("lora", "bert", "classification"))).abs().max()) > 1e-2
    )


def noise_of_a_step(payload_of: Payloads, noise: float, seed: int) -> Tensor:
    """What a step of rate 1 adds to the weights beside the clipped sum, in units of sigma = 1."""
    examples, clip = records("causal-lm", 4), 0.5
    found = []
    for multiplier in (0.0, noise):
        payload = payload_of("full")
        start = weights(payload)
        run(payload, examples, noise=multiplier, clip=clip, seed=seed)
        found.append((weights(payload) - start).double())
    return (found[0] - found[1]) * len(examples) / clip


def accepts(samples: Tensor, std: float) -> bool:
    """Whether the samples' mean, variance and share beyond one std are a normal distribution's."""
    count = samples.numel()
    mean = float(samples.mean()) / std * math.sqrt(count)
    variance = (float(samples.square().mean()) / std**2 - 1) * math.sqrt(count / 2)
    share = float((samples.abs() > std).double().mean())
    beyond = (share - 0.31731) / math.sqrt(0.31731 * 0.68269 / count)
    return max(abs(mean), abs(variance), abs(beyond)) < 4.5


@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_the_noise_has_the_scale_that_was_asked_for(payload_of: Payloads, sigma: float) -> None:
    samples = noise_of_a_step(payload_of, sigma, seed=3)
    assert samples.numel() > 5000
    assert accepts(samples, sigma)
    assert not accepts(samples, sigma * 2 / 3)
    assert not accepts(samples, sigma * 3 / 2)
    for wrong in (2 / 3, 3 / 2):
        assert not accepts(noise_of_a_step(payload_of, sigma * wrong, seed=3), sigma)
    again = noise_of_a_step(payload_of, sigma, seed=4)  # another draw has nothing to do with it
    assert accepts((samples + again) / math.sqrt(2), sigma)


def test_noise_does_not_depend_on_who_was_drawn(payload_of: Payloads) -> None:
    """Steps in which nobody was drawn add the same noise, divided by the same expected number."""
    payload, examples = payload_of("full"), records("causal-lm", 4)
    start = weights(payload)
    outcome = run(payload, examples, noise=2.0, clip=0.5, rate=1e-9)
    moved = (weights(payload) - start).double()
    assert (outcome.steps, outcome.tokens, outcome.loss) == (1, 0, 0.0)
    assert accepts(moved * (1e-9 * 4) / 0.5, 2.0)


def test_proximal_pull_and_shift_come_after_the_noise(payload_of: Payloads) -> None:
    """With nobody drawn and no noise they are all that is left: w - lr (mu (w - a) + c)."""
    payload = payload_of("lora")
    start = payload.select()
    anchor = {name: tensor - 1.0 for name, tensor in start.items()}
    shift = {name: torch.full_like(tensor, 0.25) for name, tensor in start.items()}
    pull = Correction(0.5, anchor, shift)
    run(payload, records("causal-lm", 3), rate=1e-9, rate_of_learning=0.1, correction=pull)
    for name, tensor in payload.select().items():
        assert torch.allclose(tensor, start[name] - 0.1 * (0.5 + 0.25), atol=1e-6)


def test_the_shape_is_kept_by_noise_too(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    start = payload.select()

    def only_b(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t * float("lora_B" in name) for name, t in found.items()}

    run(payload, records("causal-lm", 3), noise=1.0, clip=1.0, shaped=only_b)
    for name, tensor in payload.select().items():
        assert torch.equal(tensor, start[name]) == ("lora_A" in name)


def test_what_is_held_still_gets_no_noise(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    start = payload.select()
    for name, parameter in payload.parameters.items():
        parameter.requires_grad_("lora_B" in name)
    run(payload, records("causal-lm", 3), noise=1.0, clip=1.0)
    for name, tensor in payload.select().items():
        assert torch.equal(tensor, start[name]) == ("lora_A" in name)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_same_seed_same_bytes(payload_of: Payloads, kind: str) -> None:
    def trained_with(seed: int) -> bytes:
        payload = payload_of(kind, **({"dropout": 0.3} if kind == "lora" else {}))
        config = TrainConfig(optimizer="adamw")
        run(payload, records("causal-lm"), noise=1.0, clip=0.5, rate=0.6, seed=seed, steps=3,
            rate_of_learning=0.01, config=config)  # fmt: skip
        return weights(payload).numpy().tobytes()

    assert trained_with(1) == trained_with(1)
    assert trained_with(1) != trained_with(2)


def test_dropout_is_as_secret_as_the_noise(payload_of: Payloads) -> None:
    """Who knows the masks can see a record in what it does to those of the others."""

    def stepped(seed: int, *, clip: float = NO_CLIP) -> Tensor:
        payload = payload_of("full", "bert", "classification", dropped=0.1)
        run(payload, records("classification"), seed=seed, clip=clip, rate_of_learning=0.1)
        return weights(payload)

    # No noise, and every record in the step: nothing but dropout is left to differ.
    assert torch.equal(stepped(1), stepped(1))
    assert not torch.equal(stepped(1), stepped(2))
    assert not torch.allclose(stepped(1, clip=0.5), stepped(2, clip=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_with_dropout_every_record_is_clipped_all_the_same(
    payload_of: Payloads, method: str
) -> None:
    payload = payload_of("full", "bert", "classification", dropped=0.3)
    for record in records("classification"):
        assert norm(summed(payload, method, [record], 0.5)) <= 0.5
    whole = norm(summed(payload, method, records("classification"), 0.5))
    assert 0 < whole <= 0.5 * len(records("classification"))


def test_weights_that_are_not_finite_are_an_error(payload_of: Payloads) -> None:
    with pytest.raises(TrainingError, match=r"finite weights.*lower train\.learning-rate"):
        run(payload_of("lora"), records("causal-lm", 3), noise=1.0, clip=1.0, steps=3,
            rate_of_learning=3e38)  # fmt: skip


def test_training_in_private_lowers_the_loss(payload_of: Payloads) -> None:
    payload, examples = payload_of("lora"), records("causal-lm", 5)
    config = TrainConfig(optimizer="adamw")
    outcome = run(payload, examples, noise=0.05, clip=1.0, steps=20, rate_of_learning=0.02,
                  config=config)  # fmt: skip
    last = run(payload, examples, noise=0.0, clip=1.0, rate_of_learning=1e-9)
    assert last.loss < 0.9 * outcome.loss
