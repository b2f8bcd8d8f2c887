"""Scoring on held-out rows, in sums that add up over sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.batches import Batch, eval_batches
from models.config import TrainConfig
from models.payload import Payload
from models.text import IGNORED, Ranked
from models.train import autocast, on


@dataclass(frozen=True)
class Score:
    """Sums over held-out rows, so that scores of several sites add up exactly."""

    loss_sum: float = 0.0
    counted: int = 0
    correct: int = 0
    rows: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.loss_sum + other.loss_sum,
            self.counted + other.counted,
            self.correct + other.correct,
            self.rows + other.rows,
        )

    @property
    def loss(self) -> float:
        """Mean loss per counted label, in nats; NaN without any."""
        return self.loss_sum / self.counted if self.counted else math.nan

    def metric(self, name: str) -> float:
        """`perplexity` from the loss, or `accuracy` over rows; NaN without rows."""
        if name == "perplexity":
            return math.exp(min(self.loss, 700.0)) if self.counted else math.nan
        return self.correct / self.rows if self.rows else math.nan


@torch.no_grad()
def evaluate(payload: Payload, batches: Iterable[Batch], config: TrainConfig) -> Score:
    """Score the module as it is; a row with a class label is correct if its class comes first."""
    score = Score()
    payload.module.eval()
    for batch in batches:
        inputs = on(batch.inputs, payload.device)
        with autocast(config.precision, payload.device):
            output = payload.module(**inputs)
        labels = inputs["labels"]
        correct = int((output.logits.argmax(-1) == labels).sum()) if labels.dim() == 1 else 0
        score += Score(float(output.loss) * batch.counted, batch.counted, correct, len(labels))
    return score


@torch.no_grad()
def rank(
    payload: Payload, ranked: Sequence[Ranked], config: TrainConfig, batch_size: int, pad_id: int
) -> int:
    """How many rows give their right answer the highest log-probability of all candidates.

    The log-probability of an answer is the sum over its tokens, given the prompt (Brown et al.
    2020, section 2.4).
    """
    candidates = [candidate for row in ranked for candidate in row.candidates]
    likelihood = torch.zeros(len(candidates))
    payload.module.eval()
    for batch in eval_batches(candidates, batch_size, pad_id):
        inputs = on(batch.inputs, payload.device)
        labels = inputs.pop("labels")
        with autocast(config.precision, payload.device):
            logits = payload.module(**inputs).logits
        likelihood[list(batch.rows)] = _answer_likelihood(logits, labels).cpu()
    right = 0
    for row, scores in zip(
        ranked, likelihood.split([len(row.candidates) for row in ranked]), strict=True
    ):
        right += int(scores.argmax()) == row.label
    return right


def _answer_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the labels' log-probabilities (rows,), from logits (rows, tokens, vocabulary)."""
    logits = logits[:, -labels.shape[1] :]  # virtual tokens stand before the text
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:],
        ignore_index=IGNORED, reduction="none",
    )  # fmt: skip
    return -losses.sum(-1)
