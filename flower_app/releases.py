"""What a site releases under a configuration, as its policy judges it and its ledger keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flower_app.config import Config
from privacy.accounting import calibrate
from privacy.events import Event


@dataclass(frozen=True)
class RecordPlan:
    """Noisy steps of a site under record-level DP: how many in a round, how sampled, how noisy."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def record_plan(config: Config, rows: int) -> RecordPlan:
    """What `rows` records of one site lead to; noise is calibrated for all rounds of the run.

    One record is one row, and each takes part in a step with the chance
    train.batch-size * train.grad-accumulation / rows. Raises ConfigError for an epsilon that no
    noise can reach.
    """
    rate = min(1.0, config.train.batch_size * config.train.grad_accumulation / rows)
    steps = config.train.steps or math.ceil(config.train.epochs / rate)
    noise = config.privacy.noise_multiplier or calibrate(
        config.privacy.epsilon, config.privacy.delta, rate, steps * config.run.rounds
    )
    return RecordPlan(noise, rate, steps)


def releases(config: Config, rows: int, rounds: Iterable[int]) -> list[Event]:
    """What a site with `rows` records releases about them in `rounds`; nothing without DP."""
    if config.privacy.unit != "record":
        return []
    plan = record_plan(config, rows)
    return [
        Event(
            "gaussian",
            "record",
            plan.noise_multiplier,
            plan.sample_rate,
            plan.steps,
            round=round_,
        )
        for round_ in rounds
    ]
