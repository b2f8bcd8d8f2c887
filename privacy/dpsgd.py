"""DP-SGD (Abadi et al. 2016, Algorithm 1) on a site's own records, for every payload.

In each step every record takes part by a coin of its own; the gradient of its loss is clipped, the
sum gets Gaussian noise and is divided by the expected number of records. One record is one row of
the site's data; its loss is the mean over its own labels. A document that was cut into chunks is
one record still: in each step one chunk, drawn anew, stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import seeded
from models.batches import Batch, Batches
from models.config import TrainConfig
from models.payload import Payload
from models.train import Correction, Progress, Step, Trained, TrainingError, on, optimise
from privacy.noise import Source, add_gaussian, std_for
from privacy.persample import Inputs, Measured, Method, Sums, attached, empty_sums
from privacy.sampling import one_each, poisson
from privacy.selfcheck import METHODS

# Of the clipping norm, left for the rounding of float32 sums: what comes out is never longer.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Mechanism:
    """Sampled, clipped and noised sums: each is one release to account for.

    `noise_multiplier` is the noise's standard deviation over `clip_norm`, `sample_rate` the chance
    of each record in each step, `method` the name of one in `selfcheck.METHODS`.
    """

    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    method: str


def train(
    payload: Payload,
    batches: Batches,
    config: TrainConfig,
    mechanism: Mechanism,
    source: Source,
    *,
    steps: int,
    learning_rate: float,
    progress: Progress | None = None,
    correction: Correction | None = None,
    shaped: Callable[[Sums], Sums] = lambda gradients: gradients,
) -> Trained:
    """Train the payload in place for `steps` noisy steps; the change is private, the result's
    loss and tokens are not. All that is random comes from `source`, dropout included.

    `correction`, as in `models.train.train`, and `shaped`, a function of the noisy gradient, come
    after the noise; `train.max-grad-norm` has no place here. Raises TrainingError when the noisy
    weights are not finite.
    """
    records = batches.by_record
    expected = mechanism.sample_rate * len(records)
    with attached(payload, METHODS[mechanism.method], config.precision) as method:

        def gradient() -> Step:
            drawn = poisson(len(records), mechanism.sample_rate, source)
            rows = one_each([records[record] for record in drawn], source)
            physical = list(batches.of_rows(rows, method.physical))
            with seeded(_word(source)):  # dropout
                sums, loss = clipped_sum(payload, method, physical, mechanism.clip_norm)
            for name, noisy in shaped(noised(sums, mechanism, source)).items():
                payload.parameters[name].grad = (noisy / expected).float()
            return Step(
                loss / expected, sum(b.tokens for b in physical), sum(b.useful for b in physical)
            )

        outcome = optimise(
            payload, gradient, config, steps=steps, learning_rate=learning_rate, seed=0,
            progress=progress, correction=correction,
        )  # fmt: skip
    # A loss that is not finite may be one record's secret; weights are the mechanism's own output.
    if not all(bool(p.isfinite().all()) for p in payload.parameters.values()):
        raise TrainingError(
            f"Expected finite weights after {steps} noisy steps, got others; lower "
            "train.learning-rate."
        )
    return outcome


def _word(source: Source) -> int:
    """A seed for the dropout of a step, as secret as the noise.

    One record more or less moves the masks of the others in a batch. A gradient bounded for every
    mask is no private sum where the masks are known: only while nobody can tell them are those of
    the others, drawn one by one, as likely with that record as without it.
    """
    return int(source.words(1)[0]) >> 1


def clipped_sum(
    payload: Payload, method: Method, physical: list[Batch], clip_norm: float
) -> tuple[Sums, Tensor]:
    """Sum of the records' gradients, each clipped to the L2 norm `clip_norm`, and of their losses.

    A record whose gradient is not finite counts as zero.
    """
    sums = empty_sums(payload)
    loss = torch.zeros((), device=payload.device)
    for batch in physical:
        inputs = on(batch.inputs, payload.device)
        measured = _finite(method, inputs)
        if measured:
            method.add(_factors(measured, clip_norm), sums)
            loss += measured.losses.sum()
    return sums, loss


def _finite(method: Method, inputs: Inputs) -> Measured | None:
    """The rows of a batch whose gradients are finite, measured; None where there are none."""
    while True:
        measured = method.measure(inputs)
        finite = measured.norms.isfinite()
        if bool(finite.all()):
            return measured
        if not bool(finite.any()):
            return None
        # Once more without the others, again and again, since dropout differs each time.
        inputs = {name: values[finite] for name, values in inputs.items()}


def _factors(measured: Measured, clip_norm: float) -> Tensor:
    bound = (1 - _ROUNDING) * clip_norm
    return (bound / measured.norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)


def noised(sums: Sums, mechanism: Mechanism, source: Source) -> Sums:
    """The sums with noise of `noise_multiplier * clip_norm` on every coordinate, in float64."""
    size = sum(total.numel() for total in sums.values())
    std = std_for(mechanism.clip_norm, mechanism.noise_multiplier, size)
    return {
        name: add_gaussian(total.cpu(), std, source).to(total.device)
        for name, total in sums.items()
    }
