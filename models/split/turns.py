"""Sites one after another: FL-GLM's serial split training (Zheng et al. 2024, section 3.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from models.split.cut import Middle
from models.split.middle import Backward, Forward, MiddleWorker, value
from models.split.rounds import Settings, Streams


class Turns(Streams):
    """Sites take turns in the order of their names; the middle's weights carry on to the next.

    Each turn has an optimiser of its own. A site that is not there `wait_s` after its turn came is
    asked last, and so is one that is there and does not train, between steps, for `stall_s`. One
    whose turn it is not waits, and its stream with it.
    """

    def __init__(self, middle: Middle, sites: Sequence[str], settings: Settings) -> None:
        super().__init__(middle, sites, settings)
        self._queue = list(self._sites)
        # When the turn of the first in the queue came, once somebody is there, or its last step.
        self._since = 0.0
        self._holder = ""

    def _trains(self, site: str, asked: Forward | Backward | None) -> Tensor | None:
        self._take_turn(site)
        if asked is None:
            self._trainer.step(1)
            with self._changed:
                self._since = time.monotonic()
            return None

        def computed(worker: MiddleWorker) -> Tensor:
            self._go_on(site)
            if isinstance(asked, Forward):
                return value(worker.forward_all([asked])[0])
            return value(worker.backward_all([asked])[0])

        return self._trainer.alone(computed)

    def _take_turn(self, site: str) -> None:
        with self._changed:
            self._since = self._since or time.monotonic()
            while self._queue[:1] != [site]:
                self._go_on(site)
                self._changed.wait(self._advance())
            self._go_on(site)
            begins, self._holder = self._holder != site, site
        if begins:
            self._trainer.fresh()

    def _advance(self) -> float:
        """Pass on the turn of a site that is gone or not there; seconds until that may be so."""
        now, first = time.monotonic(), self._queue[0]
        if first not in self._open and first not in self._gone:
            left = self._since + self._settings.wait_s - now
            if left > 0:
                return left
            self._queue.append(first)
        elif first not in self._gone:
            left = self._drop_stalled([first])
            if first not in self._gone and first not in self._stepping:
                left = min(left, self._since + self._settings.stall_s - now)
            if left > 0 and first not in self._gone:
                return left
            if first not in self._gone:  # it says something, but nothing of training
                self._queue.append(first)
        self._queue.pop(0)
        self._since = now
        self._changed.notify_all()
        return 0.0

    def _leave(self, site: str, why: str) -> None:
        super()._leave(site, why)
        with self._changed:
            if self._queue[:1] == [site]:
                self._since = time.monotonic()
            self._queue = [name for name in self._queue if name != site]
            self._changed.notify_all()
