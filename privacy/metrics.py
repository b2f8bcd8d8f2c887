"""Scores on held-out rows that may leave a site: sums over records, each bounded, with noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models.batches import Batch
from models.config import TrainConfig
from models.evaluate import Score
from models.losses import losses_of
from models.payload import Payload
from models.train import autocast, on
from privacy.noise import Source, add_gaussian, std_for


@torch.no_grad()
def bounded(
    payload: Payload,
    batches: Iterable[Batch],
    by_record: Sequence[Sequence[int]],
    config: TrainConfig,
    bound: float,
) -> Score:
    """Sum over records of their mean loss, each at most `bound`, and of right classes.

    `by_record` says which rows of the batches are a record's; several count as their mean. A loss
    that is not a number counts with the bound. Not private yet: `noised` makes it so.
    """
    losses = torch.zeros(sum(len(rows) for rows in by_record), dtype=torch.float64)
    correct = 0
    payload.module.eval()
    for batch in batches:
        inputs = on(batch.inputs, payload.device)
        labels = inputs.pop("labels")
        with autocast(config.precision, payload.device):
            logits: Tensor = payload.module(**inputs).logits
        losses[list(batch.rows)] = losses_of(logits, labels).double().cpu()
        if labels.dim() == 1:
            correct += int((logits.argmax(-1) == labels).sum())
    within = losses.nan_to_num(bound, bound, 0.0).clamp(0.0, bound)
    total = sum(float(within[list(rows)].mean()) for rows in by_record)
    return Score(total, len(by_record), correct, len(by_record))


def noised(score: Score, bound: float, noise_multiplier: float, source: Source) -> Score:
    """The score as one Gaussian release: a record moves the loss by `bound`, `correct` by 1.

    In units of those bounds the pair moves by sqrt(2) in L2. The number of records is public. What
    noise makes impossible is cut off.
    """
    std = std_for(math.sqrt(2), noise_multiplier, 2)
    exact = torch.tensor([score.loss_sum / bound, float(score.correct)], dtype=torch.float64)
    loss, right = add_gaussian(exact, std, source).clamp(0.0, float(score.rows)).tolist()
    return Score(loss * bound, score.counted, round(right), score.rows)
