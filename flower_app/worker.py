"""What stays in a worker process between messages: the base model, its payload, the sites' rows."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import INFO
from typing import TYPE_CHECKING, Any

import torch
from flwr.common.logger import log

from flower_app import compose
from flower_app.config import Config
from flower_app.data.poison import poison, triggered
from flower_app.data.site import Simulation, SiteRows, load_site
from flower_app.data.source import DataError
from flower_app.node import NodeConfig
from flower_app.releases import metrics_noise
from models.base import PATHLIKE, Base, BaseCache, context
from models.batches import Batch, Batches, eval_batches
from models.evaluate import Score, evaluate, rank
from models.factors import held
from models.payload import Payload
from models.section import ConfigError
from models.seeds import derive
from models.split.site import SplitPayload, train_across
from models.text import Encoded, Labelled, Ranked, Record, encode
from models.train import Correction, Trained, train
from privacy.metrics import bounded, noised

if TYPE_CHECKING:
    from flower_app.recordlevel import Private


@dataclass(frozen=True)
class Site:
    """A site's rows, encoded: `rows` to train on in `batches`, `held_out` ones to score."""

    name: str
    rows: int
    batches: Batches
    held_out: tuple[Batch, ...]
    ranked: tuple[Ranked, ...]
    held_out_rows: int
    notes: str
    triggered: tuple[Batch, ...] = ()
    held_out_by_record: tuple[range, ...] = ()

    @property
    def candidates(self) -> int:
        """The most answers that a held-out row has to choose from, 0 where none has any."""
        return max((len(row.candidates) for row in self.ranked), default=0)


@dataclass
class Worker:
    """One per process; everything in it is keyed by what determines it."""

    bases: BaseCache = field(default_factory=BaseCache)
    _payload: tuple[str, Payload] | None = None
    _packs: bool = False
    _key: str = ""
    _simulation: Simulation | None = None
    _rows: dict[str, SiteRows] = field(default_factory=dict)
    _sites: dict[str, Site] = field(default_factory=dict)
    _methods: dict[str, str] = field(default_factory=dict)

    def model(self, config: Config, node: NodeConfig) -> tuple[Base, Payload]:
        """The base model with its payload attached, read and built on first use only."""
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        if not node.simulated and not node.model_path and config.model.name.startswith(PATHLIKE):
            raise ConfigError(
                "Expected 'model-path' in this node's config, since the server's model is a folder "
                'of its own; start the SuperNode with model-path="/where/the/model/is".'
            )
        key = compose.model_key(config, node.model_path)
        if self._payload and self._payload[0] != key:
            self._payload = None  # it holds the old base model, which is freed before the new one
        base = self.bases.get(key, lambda: compose.load_base(config, node.model_path, at_site=True))
        if self._payload is None or self._payload[0] != key:
            self._packs = compose.packs(config, base)
            self._payload = (key, compose.attach(config, base))
        return base, self._payload[1]

    def per_sample(self, config: Config, node: NodeConfig, round_: int) -> str:
        """How gradients of single records are computed in a round; checked on first use.

        Raises ConfigError when they cannot be, or not as configured.
        """
        from privacy.selfcheck import choose  # Opacus brings SciPy: a second in every process

        _, payload = self.model(config, node)
        factor = compose.held(config, round_)
        settings = (config.privacy.per_sample, config.train.precision)
        key = "\n".join([compose.model_key(config, node.model_path), factor, *settings])
        if key not in self._methods:
            with held(payload, factor):
                method = choose(payload, settings[0], config.model.task, settings[1])
            log(INFO, "Gradients of single records: %s, which equals brute force.", method)
            self._methods[key] = method
        return self._methods[key]

    def site(self, config: Config, node: NodeConfig) -> Site:
        """The node's own site, encoded; raises DataError when its rows cannot be used."""
        return self._open(config, node, self.name(config, node))

    def name(self, config: Config, node: NodeConfig) -> str:
        """Name of the node's own site; a deployed one needs to read nothing for it."""
        return self.names(config, node)[node.partition_id] if node.simulated else node.site

    def all_sites(self, config: Config, node: NodeConfig) -> list[Site]:
        """Every site of a simulation, encoded; raises ConfigError at a deployed site."""
        return [self._open(config, node, name) for name in self.names(config, node)]

    def pooled(self, config: Config, node: NodeConfig) -> Batches:
        """Training batches over the rows of every site of a simulation together."""
        base, payload = self.model(config, node)
        names = self.names(config, node)
        rows = [row for name in names for row in self._load(config, node, name).train]
        encoded = encode_rows(config, base, payload, rows)
        return self._batches(config, base, encoded, "all sites")

    def names(self, config: Config, node: NodeConfig) -> list[str]:
        """Names of the simulated sites, by partition; raises ConfigError at a deployed site."""
        if not node.simulated:
            raise ConfigError("Expected a simulation, got a deployed site, which keeps its rows.")
        return list(self._simulated(config, node).parts)

    def score(self, config: Config, site: Site, payload: Payload, pad_id: int) -> Score:
        """Score the payload, as it is loaded, on a site's held-out rows."""
        score = evaluate(payload, site.held_out, config.train)
        if site.ranked:
            right = rank(payload, site.ranked, config.train, config.train.batch_size, pad_id)
            score = Score(score.loss_sum, score.counted, right, len(site.ranked))
        return score

    def released(
        self, config: Config, site: Site, payload: Payload, pad_id: int, round_: int, when: str
    ) -> Score:
        """The score that may leave the site, `when` in the round; empty where none may.

        One that is noised is a release: charge it first.
        """
        if not config.privacy.noised_by_sites or config.privacy.metrics == "exact":
            return self.score(config, site, payload, pad_id)
        if config.privacy.metrics == "withheld" or not site.held_out:
            return Score()
        bound = config.privacy.metrics_loss_bound
        score = bounded(payload, site.held_out, site.held_out_by_record, config.train, bound)
        if site.ranked:
            right = rank(payload, site.ranked, config.train, config.train.batch_size, pad_id)
            score = replace(score, correct=right)
        source = compose.noise_source(config, "metrics", site.name, round_, when)
        return noised(score, bound, metrics_noise(config), source)

    def backdoor(self, config: Config, site: Site, payload: Payload) -> Score:
        """How many triggered held-out rows the payload puts into the attacker's class, if told."""
        if config.privacy.noised_by_sites and config.privacy.metrics != "exact":
            return Score()
        return evaluate(payload, site.triggered, config.train)

    def _open(self, config: Config, node: NodeConfig, name: str) -> Site:
        rows = self._load(config, node, name)
        if name not in self._sites:
            base, payload = self.model(config, node)
            train = encode_rows(config, base, payload, self._poisoned(config, node, rows))
            held_out = encode_rows(config, base, payload, rows.held_out)
            pad_id = pad_token(base)
            self._sites[name] = Site(
                name,
                len(train.by_record),
                self._batches(config, base, train, name),
                tuple(eval_batches(held_out.examples, config.train.batch_size, pad_id)),
                held_out.ranked,
                len(rows.held_out),
                f"{train.truncated} rows cut to train.max-length, {train.dropped} without a label "
                f"left, {rows.dropped_duplicates} also held out",
                self._triggered(config, base, payload, rows.held_out),
                held_out.by_record,
            )
        return self._sites[name]

    def _poisoned(self, config: Config, node: NodeConfig, rows: SiteRows) -> Sequence[Record]:
        """The site's training rows, poisoned where it is a malicious one of a simulation."""
        kind = compose.attack(config).poison
        if kind == "none" or rows.name not in compose.malicious(config, self.names(config, node)):
            return rows.train
        seed = derive(config.run.seed, "poison", rows.name)
        return poison(kind, rows.train, config.attack, compose.num_labels(config), seed)

    def _triggered(
        self, config: Config, base: Base, payload: Payload, held_out: Sequence[Record]
    ) -> tuple[Batch, ...]:
        """Batches on which a backdoor's success is measured; none without a backdoor."""
        if compose.attack(config).poison != "backdoor":
            return ()
        encoded = encode_rows(config, base, payload, triggered(held_out, config.attack))
        return tuple(eval_batches(encoded.examples, config.train.batch_size, pad_token(base)))

    def _simulated(self, config: Config, node: NodeConfig) -> Simulation:
        self._forget_others(config, node)
        if self._simulation is None:
            self._simulation = Simulation(config.data, node.num_partitions, config.run.seed)
        return self._simulation

    def _load(self, config: Config, node: NodeConfig, name: str) -> SiteRows:
        self._forget_others(config, node)
        if name not in self._rows:
            self._rows[name] = (
                self._simulated(config, node).site(name)
                if node.simulated
                else load_site(
                    config.data,
                    seed=config.run.seed,
                    site=name,
                    num_sites=1,
                    data_path=node.data_path,
                    eval_path=node.eval_path or None,
                )
            )
        return self._rows[name]

    def _forget_others(self, config: Config, node: NodeConfig) -> None:
        """Drop rows that were read and encoded under another configuration."""
        parts = (
            config.data,
            config.train,
            config.attack,
            node.model_copy(update={"partition_id": -1}),
        )
        model = compose.model_key(config, node.model_path)
        key = "\n".join([*(part.model_dump_json() for part in parts), model])
        if key != self._key:
            self._key = key
            self._simulation = None
            self._rows.clear()
            self._sites.clear()

    def _batches(self, config: Config, base: Base, encoded: Encoded, name: str) -> Batches:
        return Batches(
            encoded.examples,
            batch_size=config.train.batch_size,
            seed=derive(config.run.seed, "order", name),
            pad_id=pad_token(base),
            packing=self._packs,
            max_length=config.train.max_length,
            by_record=encoded.by_record,
        )


def encode_rows(config: Config, base: Base, payload: Payload, rows: Sequence[Record]) -> Encoded:
    """Encode rows for training; raises ConfigError and DataError for what the model cannot take."""
    limit, virtual = context(base.model), payload.virtual_tokens
    if limit and config.train.max_length + virtual > limit:
        beside = f" beside {virtual} virtual tokens" if virtual else ""
        raise ConfigError(
            f"Expected train.max-length of at most {limit - virtual}, the model's context of "
            f"{limit}{beside}, got {config.train.max_length}; lower it."
        )
    if config.model.task == "classification":
        _require_classes(rows, compose.num_classes(base))
    return encode(rows, base.tokenizer, config.train.max_length)


def _require_classes(rows: Sequence[Record], classes: int) -> None:
    """Raise DataError for a class that the model has no score for."""
    largest = max((row.label for row in rows if isinstance(row, Labelled)), default=0)
    if largest >= classes:
        raise DataError(
            f"Expected classes from 0 to {classes - 1}, got {largest}; set model.num-labels to at "
            f"least {largest + 1} at the server, or list all classes in data.labels."
        )


def train_round(
    config: Config,
    payload: Payload,
    batches: Batches,
    name: str,
    round_: int,
    steps: int,
    correction: Correction | None = None,
    private: Private | None = None,
) -> Trained:
    """Train the loaded payload for round `round_`, with noise where `private` says how.

    Batches go on where the round before stopped; private ones are drawn anew.
    """
    how: Any = {
        "steps": steps,
        "learning_rate": config.train.learning_rate_at(round_, config.run.rounds),
        "progress": partial(_show, name, round_),
        "correction": correction,
    }
    if private:  # whose dropout is as secret as its noise
        return private.train(payload, batches, config.train, **how)
    how["seed"] = derive(config.run.seed, "train", name, round_)
    forwards = steps * config.train.grad_accumulation
    taken = batches.take((round_ - 1) * forwards, forwards)
    if isinstance(payload, SplitPayload):
        return train_across(payload, taken, config.train, in_flight=config.split.in_flight, **how)
    return train(payload, taken, config.train, **how)


def steps_per_round(config: Config, batches: Sequence[Batches]) -> int:
    """Optimiser steps of a round at a site; over several sites, their mean."""
    return config.train.steps_in_round(sum(len(b) for b in batches) / len(batches))


def _show(name: str, round_: int, step: int, steps: int, loss: float, speed: float) -> None:
    log(INFO, "%s, round %d: step %d of %d, loss %.4f, %.0f tokens/s", name, round_, step, steps,
        loss, speed)  # fmt: skip


def pad_token(base: Base) -> int:
    """Token id to pad with; any will do, since it is masked."""
    return int(base.tokenizer.pad_token_id or 0)


def worker_name() -> str:
    """This process in the metrics: tells workers apart without naming the host."""
    return f"worker-{derive(os.getpid(), socket.gethostname()) % 16**6:06x}"
