"""How the sites of a split round share the middle: as configured, or as measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from logging import INFO
from types import MappingProxyType

import torch
from flwr.common.logger import log

from flower_app.config import Config
from flower_app.split.site import limits
from models.seeds import derive
from models.split import schedule
from models.split.adapter import factors, load_factors
from models.split.base import SplitBase
from models.split.cut import Middle, twin
from models.split.schedule import Round, Settings

_SCHEDULES: Mapping[str, Callable[[Sequence[Middle], Sequence[str], Settings], Round]] = (
    MappingProxyType(
        {
            "sequential": schedule.sequential,
            "client-batch": schedule.client_batch,
            "hierarchical": schedule.hierarchical,
        }
    )
)


class Sharing:
    """Begins the rounds of a run with `schedule`, which `auto` picks by measurement.

    `known` is what a run to resume has picked, so that it goes on as it began.
    """

    def __init__(self, config: Config, base: SplitBase, sites: int, known: str = "") -> None:
        self._config = config
        self._limits = limits(config, base.model.config.hidden_size)
        wanted = config.split.schedule
        count = config.split.replicas if wanted in ("hierarchical", "auto") else 1
        self._middles = replicas(base.middle, min(count, max(sites, 1)))
        self.schedule = known or (self._measured(sites) if wanted == "auto" else wanted)
        if self.schedule != "hierarchical":
            del self._middles[1:]

    def __call__(self, round_: int, sites: Sequence[str]) -> Round:
        """The middle during a round, as every replica finds it at the start."""
        start = factors(self._middles[0])
        for other in self._middles[1:]:
            load_factors(other, start)
        return _SCHEDULES[self.schedule](self._middles, sites, self._settings(round_))

    def _settings(self, round_: int) -> Settings:
        split, train = self._config.split, self._config.train
        return Settings(
            self._limits,
            train,
            train.learning_rate_at(round_, self._config.run.rounds),
            trains=split.middle,
            most_graphs=split.in_flight,
            join_tokens=split.join_tokens,
            wait_s=split.wait_s,
            stall_s=split.stall_s,
            seed=derive(self._config.run.seed, "middle", round_),
        )

    def _measured(self, sites: int) -> str:
        train = self._config.train
        names = [str(number) for number in range(sites)]
        choice = schedule.auto(
            self._middles, names, self._settings(1), rows=train.batch_size, tokens=train.max_length
        )
        log(INFO, "split.schedule='auto' takes %s.", choice)
        return choice.schedule


def replicas(middle: Middle, count: int) -> list[Middle]:
    """The middle and copies of it, one on each GPU; on one device they share frozen weights."""
    devices = torch.cuda.device_count()

    def another(at: int) -> Middle:
        if devices < 2:
            return twin(middle)
        return copy.deepcopy(middle).to(f"cuda:{at % devices}")

    return [middle, *(another(at) for at in range(1, count))]
