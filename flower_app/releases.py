"""What a site releases under a configuration, as its policy judges it and its ledger keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flower_app import clientlevel
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
    """What a site with `rows` records releases in training in `rounds`; nothing without DP."""
    if config.privacy.unit == "client":
        return clientlevel.site_events(config, rounds)
    if config.privacy.unit != "record":
        return []
    plan = record_plan(config, rows)
    found = []
    for round_ in rounds:
        noise, rate = plan.noise_multiplier, plan.sample_rate
        found.append(Event("gaussian", "record", noise, rate, plan.steps, round=round_))
        found += _scored(config, round_, _scores(config))
    return found


def evaluations(config: Config, round_: int) -> list[Event]:
    """What a site releases when it is asked for the score of the payload after a round."""
    return _scored(config, round_, 1)


def planned(config: Config, rows: int, rounds: Sequence[int]) -> list[Event]:
    """All that a site with `rows` records is to release in the rounds still to come."""
    first = evaluations(config, 0) if config.strategy.fraction < 1 and 1 in rounds else []
    return [*first, *releases(config, rows, rounds), *evaluations(config, config.run.rounds)]


def parts_apart(config: Config) -> bool:
    """Whether no record can be in training and held out, at a site that says no more than that.

    Sites with rows of their own may name held-out ones too, but not with a target epsilon.
    """
    own = config.data.partition == "own" and not config.privacy.epsilon
    return not own and not config.data.eval_source


def metrics_noise(config: Config) -> float:
    """Noise multiplier of scores on held-out rows, calibrated for all of a run where not given."""
    privacy = config.privacy
    if privacy.metrics_noise_multiplier:
        return privacy.metrics_noise_multiplier
    beside = 2 if config.strategy.fraction < 1 else 1  # at the end, and before the first round
    count = _scores(config) * config.run.rounds + beside
    return calibrate(privacy.epsilon, privacy.delta, 1.0, count)


def _scored(config: Config, round_: int, count: int) -> list[Event]:
    if config.privacy.unit != "record" or config.privacy.metrics != "noised":
        return []
    noise = metrics_noise(config)
    return [Event("gaussian", "record", noise, 1.0, count, part="held-out", round=round_)]


def _scores(config: Config) -> int:
    """Scores that a site sends with what it trained."""
    return 1 + config.train.score_after
