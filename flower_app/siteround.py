"""A round at a site: what it received, what it kept from earlier rounds, what it keeps now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from logging import ERROR
from typing import TYPE_CHECKING

import torch
from flwr.common.logger import log
from torch import Tensor

from flower_app import clientlevel, compose
from flower_app.config import Config
from flower_app.node import NodeConfig
from flower_app.sitestate import Groups, site_state
from flower_app.worker import Site, steps_per_round, train_round
from models.evaluate import Score
from models.factors import held, leading
from models.layout import LayoutError
from models.payload import Payload
from models.train import Correction, Trained, TrainingError
from strategies import control
from strategies.messages import Scalar

if TYPE_CHECKING:
    from flower_app.recordlevel import Private


class SiteRound:
    """Loads and trains a payload together with what stays at the site.

    `done` counts the finished rounds. The site goes on from its state of that moment, or of the
    last round that counted at the server, if that was earlier.
    Raises LayoutError when the server's payload is not laid out as the site's.
    """

    def __init__(
        self,
        config: Config,
        node: NodeConfig,
        payload: Payload,
        site: Site,
        received: Mapping[str, Tensor],
        plan: Mapping[str, Scalar],
        done: int,
    ) -> None:
        layout = compose.travelling(config, payload)
        if plan["layout"] != layout.digest:
            raise LayoutError(
                f"Expected the server's layout {str(plan['layout'])[:12]}, got "
                f"{layout.digest[:12]} at this site; use the same versions of the packages."
            )
        layout.check(received)
        self._config = config
        self._payload = payload
        self._site = site
        self._received, self._control = control.parted(received)
        self.rank = compose.site_rank(config, node)
        self._start = leading(self._received, self.rank)
        self._steps = 0
        self._done = done
        self._state = site_state(config, node, plan, site.name) if compose.keeps(config) else None
        counted = min(done, int(plan.get("counted", done)))
        self._kept: Groups = self._state.after(counted) if self._state else {}
        self._keeps: Groups = {}
        self._private: Private | None = None
        self._hidden = clientlevel.at_sites(config)
        self._void = False  # whether the round's update counts as zero
        self._load()

    def _load(self) -> None:
        """Load what the server sent, beside the site's own part or, at first, its start values."""
        self._payload.load(self._received)
        self._payload.load_personal(self._kept.get("personal", self._payload.personal_start))

    def train(self, method: str = "") -> Trained:
        """Train on the site's rows for the round that follows, with noise under record-level DP.

        `method` is then that of `Worker.per_sample`. Under noise for the whole site training never
        fails over what is not finite: that would tell something of the rows without noise.
        """
        batches, round_ = self._site.batches, self._done + 1
        if self._config.privacy.unit == "record":
            from flower_app.recordlevel import private  # brings Opacus, as in `Worker.per_sample`

            self._private = private(
                self._config, self._site.name, batches, round_, method, self.rank
            )
        steps = self._private.steps if self._private else steps_per_round(self._config, [batches])
        self._steps = steps
        scaffold = Correction(shift=control.shift(self._own_control(), self._control))
        self._payload.load(self._start)
        try:
            with held(self._payload, compose.held(self._config, self._done + 1)):
                trained = self._train(steps, self._site.name, scaffold if self._control else None)
            if self._config.train.ditto_lambda:
                self._train_personal(steps)
        except TrainingError as error:
            if not self._hidden:
                raise
            self._make_void(str(error))
            return Trained(math.nan, steps, 0, 0, 0.0)
        return trained

    def _make_void(self, why: str) -> None:
        log(ERROR, "%s: %s The round's update counts as zero.", self._site.name, why)
        self._void = True
        self._load()
        self._keeps = dict(self._kept)

    def _train(self, steps: int, name: str, correction: Correction | None = None) -> Trained:
        round_, batches = self._done + 1, self._site.batches
        return train_round(
            self._config, self._payload, batches, name, round_, steps, correction, self._private
        )

    def _train_personal(self, steps: int) -> None:
        """Ditto, the personal half of Algorithm 1 (Li et al. 2021), on the round's own batches."""
        shared = self._payload.select()
        self._payload.load(self._kept.get("ditto", self._start))
        pull = Correction(self._config.train.ditto_lambda, self._start)
        self._train(steps, f"{self._site.name} (personal)", pull)
        self._keeps["ditto"] = self._payload.select()
        self._payload.load(shared)

    def personal_score(self, shared: Score, measure: Callable[[], Score]) -> Score | None:
        """Score of Ditto's personal model as it was after `done` rounds, None without Ditto.

        `shared` is the score of the payload that was received, where the personal model begins.
        """
        if not self._config.train.ditto_lambda:
            return None
        if "ditto" not in self._kept:
            return shared
        self._payload.load(self._kept["ditto"])
        score = measure()
        self._load()
        return score

    def finish(self) -> dict[str, Tensor]:
        """Keep what stays at the site, and return the change of what travels."""
        trained = leading(self._payload.select(), self.rank)
        delta = {name: new - self._received[name] for name, new in trained.items()}
        own = (self._payload.select_personal(), *self._keeps.values())
        if self._hidden and not _finite(delta, *own):
            self._make_void("Expected a finite update, got another; lower train.learning-rate.")
        if self._void:
            delta = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
        if self._control:
            delta = control.joined(delta, self._renew_control(delta))
        if self._payload.personal:
            self._keeps["personal"] = self._payload.select_personal()
        if self._state:
            self._state.save(self._done + 1, self._keeps)
        return compose.sent(self._config, delta, self._site.name, self._done + 1)

    def _own_control(self) -> dict[str, Tensor]:
        """The site's control variate c_i, at first zero."""
        return self._kept.get("control") or control.started(self._control)

    def _renew_control(self, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the site's next control variate and return its change."""
        train, own = self._config.train, self._own_control()
        rate = train.learning_rate_at(self._done + 1, self._config.run.rounds)
        new = control.renewed(own, self._control, delta, self._steps * rate)
        self._keeps["control"] = new
        return {name: new[name] - own[name] for name in own}

    def keep_adapter(self) -> None:
        """Write the site's own model, as a PEFT adapter, beside its state."""
        if self._state:
            self._payload.load(self._kept.get("ditto", self._received))
            self._state.save_adapter(self._payload)


def _finite(*groups: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for group in groups for tensor in group.values())
