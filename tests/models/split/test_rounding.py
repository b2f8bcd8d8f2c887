"""Gradients as whole numbers: no bias in what adds up, and why no residual is carried over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.split import cut
from models.split.messages import Kind, Message
from models.split.rounding import rounded
from models.split.wire import pack, unpack
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
Send = Callable[[Tensor], Tensor]


def back(values: Tensor, bits: int, generator: torch.Generator | None = None) -> Tensor:
    levels, scales = rounded(values, bits, generator)
    return levels.float() * scales.float()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_of_many_roundings_is_the_value(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    top, count = 2 ** (bits - 1) - 1, 4000
    values = torch.tensor([1.0, 0.3 / top, -0.4 / top, 0.9 / top, -0.5, 0.0])
    scale = float(rounded(values, bits, None)[1])
    drawn = back(values.expand(count, -1), bits, generator)
    deviation = scale * 0.5 / count**0.5  # at most, of the mean
    assert bool(((drawn.mean(0) - values).abs() <= 5 * deviation).all())
    assert bool((back(values, bits) - values).abs().max() > 20 * deviation)  # the nearest is not
    assert bool(((drawn - values).abs() <= scale).all())
    assert float(drawn[:, 5].abs().max()) == 0.0


@pytest.mark.parametrize(("bits", "most"), [(8, 0.012), (4, 0.22)])
@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e-3, 1.0, 1e3, 1e30])
def test_values_of_any_size_lose_the_same_share(bits: int, most: float, size: float) -> None:
    """Gradients of a mean over many tokens are tiny: a scale must not be out of range there."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 64, 1024, generator=generator)
    lost = back(values * size, bits, generator) / size - values
    assert float(lost.norm() / values.norm()) < most


def test_the_same_seed_rounds_the_same_way_and_only_gradients() -> None:
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

    def sent(kind: Kind, seed: int) -> bytes:
        return Message(kind, 1, values).encode("int4", torch.Generator().manual_seed(seed))

    for kind in (Kind.BACKWARD, Kind.GRADIENT):
        assert sent(kind, 1) == sent(kind, 1) != sent(kind, 2)
    assert sent(Kind.HIDDEN, 1) == sent(Kind.HIDDEN, 2)
    for kind in ("fp32", "bf16"):
        assert pack(values, kind, torch.Generator().manual_seed(1)) == pack(values, kind)
    found = unpack(
        pack(values, "int8", torch.Generator().manual_seed(1)), most_tokens=6, hidden_size=8
    )
    assert float((found - values).abs().max()) <= float(values.abs().max()) / 127 * 1.01


def test_what_adds_up_has_less_bias_than_to_the_nearest_and_a_carried_residual_more() -> None:
    """At a real cut, in four bits: what adds up in a weight over 40 epochs of 8 batches."""
    parts = cut(tiny("llama"))
    generator = torch.Generator().manual_seed(0)
    carried = torch.zeros(2, 8, 32)

    def feedback(gradient: Tensor) -> Tensor:
        nonlocal carried
        found = back(gradient + carried, 4)
        carried = gradient + carried - found
        return found

    ways: dict[str, Send] = {
        "true": lambda gradient: gradient,
        "nearest": lambda gradient: back(gradient, 4),
        "unbiased": lambda gradient: back(gradient, 4, generator),
        "feedback": feedback,
    }
    batches = [at_the_tail(parts, generator) for _ in range(8)]
    weights = {way: torch.zeros(32, 32) for way in ways}
    for hidden, gradient in batches * 40:
        for way, send in ways.items():
            weights[way] += hidden.flatten(0, 1).T @ send(gradient).flatten(0, 1)
    apart = {way: float((sums - weights["true"]).norm()) for way, sums in weights.items()}
    assert apart["unbiased"] < 0.5 * apart["nearest"]
    assert apart["nearest"] < 0.1 * float(weights["true"].norm())
    assert apart["feedback"] > 10 * apart["nearest"]


def at_the_tail(parts: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states before the tail, of tokens as frequent as words, and their gradient."""
    frequency = 1 / torch.arange(1, 65).float()
    ids = torch.multinomial(frequency, 16, replacement=True, generator=generator).view(2, 8)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        hidden = parts.middle(parts.head(ids, mask), mask)
    hidden.requires_grad_()
    parts.tail.output(hidden, mask, labels=ids).loss.backward()
    return hidden.detach(), hidden.grad
