"""What a site releases under a configuration, as its policy judges it and its ledger keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flower_app import clientlevel
from flower_app.config import Config
from privacy.accounting import calibrate, check_chance
from privacy.events import Event, Part, Unit


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
    noise can reach, and for a delta that needs none.
    """
    rate = min(1.0, config.train.batch_size * config.train.grad_accumulation / rows)
    steps = config.train.steps or math.ceil(config.train.epochs / rate)
    whole = steps * config.run.rounds
    check_chance(rate, whole, config.privacy.delta)
    noise = config.privacy.noise_multiplier or calibrate(
        config.privacy.epsilon, config.privacy.delta, rate, whole
    )
    return RecordPlan(noise, rate, steps)


def unit_of(config: Config) -> Unit | None:
    """What the noise of a run protects; None without noise."""
    if config.split.noise:
        return "position"
    return None if config.privacy.unit == "none" else config.privacy.unit


def releases(
    config: Config, rows: int, rounds: Iterable[int], batches: int = 0, candidates: int = 0
) -> list[Event]:
    """What a site with `rows` records releases in training in `rounds`; nothing without noise.

    `batches` are the micro-batches of an epoch, 0 where they are not known, `candidates` the most
    answers that a held-out row has to choose from.
    """
    if config.split.noise:
        told = (_streamed(config, rows, at, batches, candidates) for at in rounds)
        return [event for events in told for event in events]
    if config.privacy.unit == "client":
        return clientlevel.site_events(config, rounds)
    if config.privacy.unit != "record":
        return []
    plan = record_plan(config, rows)
    found = []
    for round_ in rounds:
        noise, rate = plan.noise_multiplier, plan.sample_rate
        found.append(Event("gaussian", "record", noise, rate, plan.steps, round=round_))
        found += _scored(config, round_, _scores(config, round_))
    return found


def evaluations(config: Config, round_: int, candidates: int = 0) -> list[Event]:
    """What a site releases when it is asked for the score of the payload after a round."""
    return [*_scored(config, round_, 1), *_scoring(config, round_, candidates)]


def planned(
    config: Config, rows: int, rounds: Sequence[int], batches: int = 0, candidates: int = 0
) -> list[Event]:
    """All that a site with `rows` records is to release in the rounds still to come."""
    early = config.strategy.fraction < 1 and 1 in rounds
    first = evaluations(config, 0, candidates) if early else []
    training = releases(config, rows, rounds, batches, candidates)
    return [*first, *training, *evaluations(config, config.run.rounds, candidates)]


def passes(config: Config, rows: int, round_: int, batches: int = 0) -> int:
    """How often, at most, a round of training reads one row: the epochs that it is a part of.

    `batches` are those of an epoch; where they are not known (0), at least as many as `rows` need.
    """
    train = config.train
    least = batches or math.ceil(rows / train.batch_size)
    taken = train.steps_in_round(least) * train.grad_accumulation
    if batches:
        return (round_ * taken - 1) // batches - (round_ - 1) * taken // batches + 1
    # Long rows are cut into several, so that epochs may be longer and begin anywhere in a round.
    beyond = train.grad_accumulation - 2
    reach = taken - 2 if train.steps else train.epochs * least + max(beyond, 0)
    return 2 + max(0, math.floor(reach / least))


def _streamed(config: Config, rows: int, round_: int, batches: int, candidates: int) -> list[Event]:
    """The vectors of one position on the stream: a hidden state and a gradient in every pass."""
    count = 2 * passes(config, rows, round_, batches)
    scored = _scoring(config, round_, candidates) if config.train.scores_in(round_) else []
    return [_vectors(config, round_, count, "training"), *scored]


def _scoring(config: Config, round_: int, candidates: int) -> list[Event]:
    """The hidden states of one held-out position when rows are scored once."""
    if not config.split.noise:
        return []
    # A prompt leaves with its right answer, then with each one; a row also with a trigger.
    count = 1 + candidates + (config.attack.name != "none")
    return [_vectors(config, round_, count, "held-out")]


def _vectors(config: Config, round_: int, count: int, part: Part) -> Event:
    # Any vector may take the place of another one, which moves it by up to twice the norm.
    noise = config.split.noise / 2
    return Event(
        "gaussian", "position", noise, count=count, relation="replace-one", part=part, round=round_
    )


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
    count = sum(_scores(config, at) for at in range(1, config.run.rounds + 1)) + beside
    return calibrate(privacy.epsilon, privacy.delta, 1.0, count)


def _scored(config: Config, round_: int, count: int) -> list[Event]:
    if not count or config.privacy.unit != "record" or config.privacy.metrics != "noised":
        return []
    noise = metrics_noise(config)
    return [Event("gaussian", "record", noise, 1.0, count, part="held-out", round=round_)]


def _scores(config: Config, round_: int) -> int:
    """Scores that a site sends with what it trained in a round."""
    return (1 + config.train.score_after) * config.train.scores_in(round_)
