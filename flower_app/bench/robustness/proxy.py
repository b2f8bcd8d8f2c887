"""The cheap model of the grid: LoRA on one frozen dense layer, and a head, over cached features.

Shape suffixes: N sites, B rows of a batch, H features, R rank, C classes, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flower_app.bench.robustness.features import Features
from flower_app.bench.robustness.task import CLASSES, Rows
from models.layout import Layout
from models.seeds import derive

RANK = 8
SCALE = 2.0
"""LoRA's alpha / rank, as the app's default."""


@dataclass(frozen=True)
class Schedule:
    """How much is trained: rounds, and at each site steps of a batch, with AdamW."""

    rounds: int = 12
    steps: int = 6
    batch: int = 16
    learning_rate: float = 3e-3


class Proxy:
    """The model over `features`; local steps of all sites run in one batched multiplication."""

    def __init__(self, features: Features) -> None:
        """Work out what the frozen layer makes of every row, once."""
        self._x_RH = features.features_RH
        self._wx_RH = features.features_RH @ features.weight.T + features.bias
        width = self._x_RH.shape[1]
        self.layout = Layout(
            ("pooler.lora_A.weight", "pooler.lora_B.weight", "classifier.weight",
             "classifier.bias"),
            ((RANK, width), (width, RANK), (CLASSES, width), (CLASSES,)),
        )  # fmt: skip

    def start(self, seed: int) -> Tensor:
        """Start values (D,): B and the head's bias are zero, so that training starts at W."""
        generator = torch.Generator().manual_seed(derive(seed, "payload"))
        named = {
            name: torch.zeros(shape)
            for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
        }
        width = self._x_RH.shape[1]
        named["pooler.lora_A.weight"].normal_(0.0, width**-0.5, generator=generator)
        named["classifier.weight"].normal_(0.0, 0.02, generator=generator)
        return self.layout.flatten(named)

    def train(
        self, base_D: Tensor, sites: Sequence[Rows], seeds: Sequence[int], schedule: Schedule
    ) -> Tensor:
        """Deltas (N, D) after a round of local training from `base_D`, of each site on its own.

        `seeds` draw each site's batches. Sites share no arithmetic but the multiplication's call.
        """
        drawn = [self._draw(rows, seed, schedule) for rows, seed in zip(sites, seeds, strict=True)]
        index_NSB = torch.stack([index for index, _ in drawn])
        labels_NSB = torch.stack([labels for _, labels in drawn])
        parts = [
            part.expand(len(sites), *part.shape).clone().requires_grad_()
            for part in self.layout.unflatten(base_D).values()
        ]
        optimizer = torch.optim.AdamW(parts, schedule.learning_rate, weight_decay=0.0, foreach=True)
        for step in range(schedule.steps):
            optimizer.zero_grad()
            logits_NBC = self._logits(parts, index_NSB[:, step])
            loss = cross_entropy(
                logits_NBC.flatten(0, 1), labels_NSB[:, step].flatten(), reduction="sum"
            )
            (loss / schedule.batch).backward()
            optimizer.step()
        flat = [part.detach().reshape(len(sites), -1) for part in parts]
        return torch.cat(flat, dim=1) - base_D

    @torch.no_grad()
    def right(self, payload_D: Tensor, rows: Rows) -> Tensor:
        """Which rows a payload (D,) puts into the class that they are labelled with, bool (R,)."""
        parts = [part[None] for part in self.layout.unflatten(payload_D).values()]
        logits = self._logits(parts, rows.index_R[None])[0]
        return logits.argmax(-1) == rows.labels_R

    def _logits(self, parts: Sequence[Tensor], index_NB: Tensor) -> Tensor:
        a_NRH, b_NHR, head_NCH, bias_NC = parts
        x_NBH = self._x_RH[index_NB]
        low_NBR = torch.bmm(x_NBH, a_NRH.transpose(1, 2))
        hidden_NBH = torch.baddbmm(
            self._wx_RH[index_NB], low_NBR, b_NHR.transpose(1, 2), alpha=SCALE
        ).tanh()
        return torch.baddbmm(bias_NC[:, None], hidden_NBH, head_NCH.transpose(1, 2))

    def _draw(self, rows: Rows, seed: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(rows.index_R), (schedule.steps, schedule.batch), generator=generator)
        return rows.index_R[at], rows.labels_R[at]
