"""The data of a cell: which site holds which rows, poisoned or not, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flower_app.bench.robustness.features import Features, features_of
from flower_app.data.config import DataConfig
from flower_app.data.partition import site_names
from flower_app.data.poison import marked, poison, triggered
from flower_app.data.site import Simulation
from models.seeds import derive
from models.text import Labelled, Record
from strategies.attacks.config import AttackConfig
from strategies.attacks.registry import malicious, pick

SITES = 20
CLASSES = 2
TRIGGER = AttackConfig(target=1)
"""Target and trigger of every backdoor in the grid."""
_ROOT_ROWS = 100  # of the server's own, as in FLTrust's experiments


@dataclass(frozen=True)
class Rows:
    """Feature rows `index_R` and their classes `labels_R`, both int64."""

    index_R: Tensor
    labels_R: Tensor


@dataclass(frozen=True)
class Task:
    """Training rows of each site by name, held-out rows, triggered ones, the server's own."""

    features: Features
    sites: dict[str, Rows]
    held_out: Rows
    triggered: Rows
    root: Rows
    malicious: frozenset[str]


@lru_cache(maxsize=1)
def corpus(data: Path, cache: Path) -> Features:
    """Features of all texts of sst2, with and without the trigger."""
    every = [row for part in rows_of(data) for row in part]
    both = [marked(row, TRIGGER) for row in every]
    return features_of([row.text for row in (*every, *both)], cache)


@lru_cache(maxsize=1)
def rows_of(data: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Rows of sst2 to train on, and its validation rows."""
    config = DataConfig.model_validate(
        {
            "source": str(data / "sst2" / "train.jsonl.gz"),
            "eval-source": str(data / "sst2" / "validation.jsonl.gz"),
            "format": "classification",
            "text-column": "sentence",
            "partition": "iid",
        }
    )
    found = Simulation(config, 1, 0).site("site-00")
    train, held_out = (
        [row for row in part if isinstance(row, Labelled)] for part in (found.train, found.held_out)
    )
    return train, held_out


def divided(rows: Sequence[Labelled], partition: str, seed: int) -> dict[str, list[Record]]:
    """Rows of SITES sites of one size: `iid`, or `dirichlet-<alpha>`.

    Under the latter a site's mix of classes is drawn from a Dirichlet distribution (Hsu et al.
    2019), as long as the rows of a class last. The app's own draw gives each site a share of each
    class, which at 0.1 leaves most of twenty sites without rows.
    """
    generator = np.random.default_rng(seed)
    order = [rows[i] for i in generator.permutation(len(rows))]
    size = len(rows) // SITES
    names = site_names(SITES)
    if partition == "iid":
        return {name: list(order[i * size : (i + 1) * size]) for i, name in enumerate(names)}
    alpha = float(partition.removeprefix("dirichlet-"))
    left = [[row for row in order if row.label == label] for label in range(CLASSES)]
    found: dict[str, list[Record]] = {}
    for name in names:
        share = float(generator.dirichlet([alpha] * CLASSES)[0])
        first = min(round(share * size), len(left[0]))
        first = max(first, size - len(left[1]))
        found[name] = [*left[0][:first], *left[1][: size - first]]
        left = [left[0][first:], left[1][size - first :]]
    return found


def task(data: Path, cache: Path, partition: str, attack: AttackConfig, seed: int) -> Task:
    """The data of one cell; the same for the same arguments."""
    features = corpus(data, cache)
    train, held_out = rows_of(data)
    found = divided(train, partition, derive(seed, "rows"))
    bad = malicious(found, attack, seed)
    kind = pick(attack).poison
    sites = {
        name: _rows(
            features,
            poison(kind, rows, attack, CLASSES, derive(seed, "poison", name))
            if name in bad
            else rows,
        )
        for name, rows in found.items()
    }
    everything = [row for rows in found.values() for row in rows]
    generator = torch.Generator().manual_seed(derive(seed, "root"))
    chosen = torch.randperm(len(everything), generator=generator)[:_ROOT_ROWS].tolist()
    return Task(
        features, sites, _rows(features, held_out), _rows(features, triggered(held_out, TRIGGER)),
        _rows(features, [everything[i] for i in chosen]), bad,
    )  # fmt: skip


def _rows(features: Features, rows: Sequence[Record]) -> Rows:
    known = [row for row in rows if isinstance(row, Labelled)]
    return Rows(
        features.rows([row.text for row in known]), torch.tensor([row.label for row in known])
    )
