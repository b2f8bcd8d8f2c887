"""Record-level privacy of a site's round: noisy training, and what of its scores may leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flower_app import compose
from flower_app.config import Config
from flower_app.releases import record_plan
from models.batches import Batches
from models.config import TrainConfig
from models.factors import leading
from models.payload import Payload
from models.train import Trained
from privacy import dpsgd
from privacy.dpsgd import Mechanism
from privacy.noise import Source
from privacy.persample import Sums


@dataclass(frozen=True)
class Private:
    """How one round of one site trains: the mechanism, and where its randomness comes from.

    It takes `steps` steps, for which it is accounted; `shaped` is applied to every noisy gradient.
    """

    steps: int
    mechanism: Mechanism
    source: Source
    shaped: Callable[[Sums], Sums]

    def train(self, payload: Payload, batches: Batches, config: TrainConfig, **how: Any) -> Trained:
        """`privacy.dpsgd.train` with this mechanism; `how` are its keywords."""
        return dpsgd.train(
            payload, batches, config, self.mechanism, self.source, shaped=self.shaped, **how
        )


def private(
    config: Config, site: str, batches: Batches, round_: int, method: str, rank: int
) -> Private:
    """Record-level training of `site` in a round, with LoRA of `rank`; raises ConfigError."""
    plan = record_plan(config, len(batches.by_record))
    mechanism = Mechanism(config.privacy.clip_norm, plan.noise_multiplier, plan.sample_rate, method)
    source = compose.noise_source(config, "dp-sgd", site, round_)
    # Noise would fill the components that a site of lower rank leaves at zero.
    return Private(plan.steps, mechanism, source, lambda gradients: leading(gradients, rank))
