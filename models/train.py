"""Local training: one loop for every payload kind and task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.base import seeded
from models.batches import Batch
from models.config import TrainConfig
from models.payload import Payload

Progress = Callable[[int, int, float, float], None]  # step, steps, loss, tokens per second
_PROGRESS_EVERY_S = 5.0


class TrainingError(RuntimeError):
    """Local training that cannot go on."""


@dataclass(frozen=True)
class Trained:
    """What a round of local training did; `loss` is the mean over steps, `seconds` wall time."""

    loss: float
    steps: int
    tokens: int
    useful_tokens: int
    seconds: float


@dataclass(frozen=True)
class Correction:
    """What is added to the gradient of every step, by parameter name, against drift between sites.

    mu * (w - anchor) is the gradient of (mu / 2) * ||w - anchor||^2 (FedProx, Ditto) and comes
    before clipping, `shift` after it (SCAFFOLD). Parameters without an entry are left alone.
    """

    mu: float = 0.0
    anchor: Mapping[str, Tensor] = field(default_factory=dict)
    shift: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, where: torch.device) -> Correction:
        """The same with copies of its tensors on the device `where`."""
        anchor, shift = (
            {name: tensor.detach().to(where, copy=True) for name, tensor in tensors.items()}
            for tensors in (self.anchor, self.shift)
        )
        return Correction(self.mu, anchor, shift)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Arithmetic of the forward pass: bfloat16 autocast where asked for or worth it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bfloat16" or (precision == "auto" and fast):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def train(
    payload: Payload,
    batches: Iterator[Batch],
    config: TrainConfig,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    progress: Progress | None = None,
    correction: Correction | None = None,
) -> Trained:
    """Train the payload in place for `steps` optimiser steps on the next batches.

    The loss of a step is the mean over its counted labels, whatever the accumulation. Without a
    `correction` of the caller's that of `prox_mu` holds: (mu / 2) * ||w - w_0||^2 is added to the
    loss, w_0 being the shared weights at entry (FedProx, Li et al. 2020, equation 2). Raises
    TrainingError when the loss is not finite.
    """
    where = payload.device

    def gradient() -> Step:
        micro = [next(batches) for _ in range(config.grad_accumulation)]
        counted = sum(batch.counted for batch in micro)
        total = torch.zeros((), device=where)
        for batch in micro:
            with autocast(config.precision, where):
                loss = payload.module(**on(batch.inputs, where)).loss
            loss = loss * (batch.counted / counted)
            loss.backward()
            total += loss.detach()
        return Step(total, sum(b.tokens for b in micro), sum(b.useful for b in micro))

    trained = optimise(
        payload, gradient, config, steps=steps, learning_rate=learning_rate, seed=seed,
        progress=progress, correction=correction, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    return finite(trained)


def finite(trained: Trained) -> Trained:
    """What training did, if its loss is finite; raises TrainingError."""
    if not math.isfinite(trained.loss):
        raise TrainingError(
            f"Expected a finite training loss, got {trained.loss} within {trained.steps} steps; "
            "lower train.learning-rate or set train.max-grad-norm."
        )
    return trained


@dataclass(frozen=True)
class Step:
    """A gradient was computed: its loss, and the tokens it took, with and without padding."""

    loss: Tensor
    tokens: int
    useful: int


def optimise(
    payload: Payload,
    gradient: Callable[[], Step],
    config: TrainConfig,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Progress | None = None,
    correction: Correction | None = None,
    max_grad_norm: float = 0.0,
) -> Trained:
    """Take `steps` optimiser steps, each on what `gradient` leaves in the parameters' `grad`."""
    where = payload.device
    if correction is None:
        correction = Correction(config.prox_mu, payload.shared if config.prox_mu else {})
    correction = correction.on(where)
    optimizer = optimizer_of(config, list(payload.parameters.values()), learning_rate)
    loss_sum = torch.zeros((), device=where)
    tokens = useful = 0
    started = shown = time.perf_counter()
    payload.module.train()
    with seeded(seed):  # dropout
        for step in range(1, steps + 1):
            done = gradient()
            loss_sum += done.loss
            tokens, useful = tokens + done.tokens, useful + done.useful
            _step(optimizer, payload.parameters, correction, max_grad_norm)
            now = time.perf_counter()
            if progress and (now - shown > _PROGRESS_EVERY_S or step == steps):
                shown = now
                progress(step, steps, float(loss_sum) / step, tokens / (now - started))
    mean = float(loss_sum) / max(steps, 1)
    return Trained(mean, steps, tokens, useful, time.perf_counter() - started)


def optimizer_of(
    config: TrainConfig, parameters: list[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """A new optimiser as configured, for these parameters."""
    kinds: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    return kinds[config.optimizer](
        parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True
    )


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    correction: Correction,
    max_grad_norm: float,
) -> None:
    trained = {name: p for name, p in parameters.items() if p.grad is not None}
    for name in trained.keys() & correction.anchor.keys():
        apart = trained[name] - correction.anchor[name]
        _gradient(trained[name]).add_(apart, alpha=correction.mu)
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), max_grad_norm)
    for name in trained.keys() & correction.shift.keys():
        _gradient(trained[name]).add_(correction.shift[name])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def on(inputs: Mapping[str, Tensor], where: torch.device) -> dict[str, Tensor]:
    """The inputs of a batch on the device `where`."""
    return {name: tensor.to(where, non_blocking=True) for name, tensor in inputs.items()}
