"""One cell of the grid: a federation under an attack, behind a defence, on the proxy.

Shape suffixes: N sites, D parameters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flower_app.bench.robustness.proxy import SCALE, Proxy, Schedule
from flower_app.bench.robustness.task import TRIGGER, Task, corpus, task
from models.section import ConfigError
from models.seeds import derive
from models.wire import encode
from strategies import together
from strategies.attacks.config import AttackConfig
from strategies.attacks.malformed import Sent
from strategies.attacks.registry import pick
from strategies.attacks.view import View
from strategies.cohort import Cohort, CohortError
from strategies.config import StrategyConfig
from strategies.gate import Gate, Refusal, Reply
from strategies.registry import build, split_names
from strategies.stage import Rule

GATE = StrategyConfig()


@dataclass(frozen=True)
class Cell:
    """What is tried: `attack` and its options, the defence, how rows lie, and the seed."""

    attack: str
    options: tuple[tuple[str, Any], ...]
    fraction: float
    rule: str
    pre: str
    partition: str
    seed: int

    @property
    def key(self) -> str:
        """A name that no other cell has, nor this one with updates compared by another scale."""
        values = [str(value) for value in asdict(self).values()]
        if together.compares(self.rule, split_names(self.pre)):
            values.append(f"lora-scale={SCALE:g}")
        return "|".join(values)

    @property
    def attacking(self) -> AttackConfig:
        """The settings of the attack; the grid's trigger and target."""
        given = {"name": self.attack, "fraction": self.fraction, **dict(self.options)}
        return TRIGGER.model_copy(update=given)


@dataclass
class Federation:
    """A cell under way: payload, state of the chain, and what the gate refused."""

    cell: Cell
    schedule: Schedule
    proxy: Proxy
    data: Task
    chain: Rule
    payload_D: Tensor
    state: dict[str, Tensor]
    refused: dict[str, str] = field(default_factory=dict)

    def round(self, number: int) -> None:
        """Train, attack, gate, aggregate."""
        names = sorted(self.data.sites)
        lanes = [self.data.sites[name] for name in names]
        trusting = "fltrust" in (self.cell.rule, *self.cell.pre.split(","))
        if trusting:
            names, lanes = [*names, "server"], [*lanes, self.data.root]
        seeds = [derive(self.cell.seed, "order", name, number) for name in names]
        rows_ND = self.proxy.train(self.payload_D, lanes, seeds, self.schedule)
        rows = dict(zip(names, rows_ND, strict=True))
        trusted_D = rows.pop("server", None)
        admitted = self._gated(number, self._sent(number, rows))
        cohort = Cohort.of(
            self.proxy.layout,
            self.payload_D,
            {site: row_D for site, (row_D, _) in admitted.items()},
            {site: float(count) for site, (_, count) in admitted.items()},
        )
        cohort = replace(
            cohort, lora_scale=SCALE, trusted_D=trusted_D, caught=len(rows) - len(admitted)
        )
        generator = torch.Generator().manual_seed(derive(self.cell.seed, "chain", number))
        delta, self.state = self.chain.apply(self.state, cohort, generator)
        self.payload_D = self.payload_D + delta.vector_D

    def _sent(self, number: int, rows: Mapping[str, Tensor]) -> dict[str, Sent]:
        """What each site sends, the malicious ones under the attack."""
        layout, options = self.proxy.layout, self.cell.attacking
        attack = pick(options)
        bad = sorted(self.data.malicious)
        honest = [row for name, row in rows.items() if name not in self.data.malicious]
        forged = dict(rows)
        if bad:
            own_MD = torch.stack([rows[name] for name in bad])
            view = View(torch.stack(honest), own_MD, self.payload_D, layout)
            generator = torch.Generator().manual_seed(derive(self.cell.seed, "attack", number))
            forged |= dict(zip(bad, attack.forged(view, options, generator), strict=True))
        sent = {}
        for name, row_D in forged.items():
            arrays = {key: encode(value) for key, value in layout.unflatten(row_D).items()}
            count = len(self.data.sites[name].index_R)
            sent[name] = Sent(arrays, number, layout.digest, count)
            if name in self.data.malicious and attack.spoil is not None:
                sent[name] = attack.spoil(sent[name], layout)
        return sent

    def _gated(self, number: int, sent: Mapping[str, Sent]) -> dict[str, tuple[Tensor, int]]:
        gate = Gate(number, self.proxy.layout, set(sent), GATE.max_update_norm, GATE.weight_cap)
        admitted = {}
        for name, what in sent.items():
            reply = Reply(
                name, what.round, what.layout_digest, what.num_examples, what.arrays, nbytes=0
            )
            try:
                update = gate.admit(reply)
                admitted[name] = (update.delta_D, update.num_examples)
            except Refusal as refusal:
                self.refused[name] = refusal.kind
        return admitted


def run_cell(cell: Cell, schedule: Schedule, data: Path, cache: Path) -> dict[str, Any]:
    """Run a cell; what became of it, as a line of the grid's file.

    `accuracy` is the last payload's on held-out rows, `backdoor` the share of triggered rows of
    other classes in the target class, `flipped` the same of those rows only that it puts right
    without the trigger. All are absent where the rule refuses the cohort; `refused` says why.
    """
    started = time.monotonic()
    line: dict[str, Any] = {**asdict(cell), "key": cell.key, "schedule": asdict(schedule)}
    try:
        federation = prepared(cell, schedule, data, cache)
        for number in range(1, schedule.rounds + 1):
            federation.round(number)
    except (ConfigError, CohortError) as error:
        return line | {"refused": str(error), "seconds": time.monotonic() - started}
    return line | _measured(federation) | {"seconds": time.monotonic() - started}


def _measured(federation: Federation) -> dict[str, Any]:
    proxy, payload_D, data = federation.proxy, federation.payload_D, federation.data
    held_out = proxy.right(payload_D, data.held_out)
    triggered = proxy.right(payload_D, data.triggered)  # labelled as the target
    without = held_out[data.held_out.labels_R != TRIGGER.target]
    return {
        "accuracy": float(held_out.float().mean()),
        "backdoor": float(triggered.float().mean()),
        "flipped": float(triggered[without].float().mean()) if bool(without.any()) else 0.0,
        "quarantined": sorted(set(federation.refused.values())),
    }


def prepared(cell: Cell, schedule: Schedule, data: Path, cache: Path) -> Federation:
    """A cell before its first round."""
    rows = task(data, cache, cell.partition, cell.attacking, cell.seed)
    proxy = _proxy(data, cache)
    # A defence is told how many attackers there may be, also where there are none.
    told = round(cell.fraction * len(rows.sites))
    chain = build(StrategyConfig(rule=cell.rule, pre=cell.pre, num_byzantine=told))
    state = chain.init(proxy.layout.size)
    return Federation(cell, schedule, proxy, rows, chain, proxy.start(cell.seed), state)


@lru_cache(maxsize=1)
def _proxy(data: Path, cache: Path) -> Proxy:
    return Proxy(corpus(data, cache))
