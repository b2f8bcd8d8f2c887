"""Sites at the same time: what they sent is joined (FL-GLM, Zheng et al. 2024: client-batch)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

from torch import Tensor

from models.split.cut import Middle
from models.split.middle import Answer, Backward, Forward, MiddleWorker
from models.split.rounds import Settings, Streams
from models.split.step import SplitError

_LEFT = "Expected a site that takes part, got one that has left the round."
Asked = TypeVar("Asked", Forward, Backward)


@dataclass(frozen=True)
class _Wave:
    """What is computed next: passes of these, or an optimiser step of all `stepping` sites."""

    forwards: Sequence[Forward] = ()
    backwards: Sequence[Backward] = ()
    stepping: Sequence[str] = ()


@dataclass
class _Waiting:
    """A site's pass or step (None), and what came of it."""

    asked: Forward | Backward | None
    answer: Answer | None = field(default=None)
    done: bool = False


class Joined(Streams):
    """All sites train at once, on one middle and one optimiser.

    Passes wait until every site that takes part has asked for one, at most `wait_s`, and are joined
    in the order of the sites' names. A step is taken when all have asked for it, on the mean of
    their gradients, each site's loss counting the same. With every site in time, the result does
    not depend on who came first.
    """

    def __init__(
        self,
        middle: Middle,
        sites: Sequence[str],
        settings: Settings,
        drawing: Lock | None = None,
    ) -> None:
        super().__init__(middle, sites, settings, drawing)
        self._asking: dict[str, _Waiting] = {}
        self._resting: set[str] = set()  # connected, and between steps until it asks again
        self._begun: set[str] = set()  # has asked for a pass in this round
        self._taught: set[str] = set()  # sent gradients for the next step
        self._computing = False
        self._came = 0.0  # when the first site did
        self._since = 0.0  # since when the next wave is waited for

    def _rests(self, site: str) -> None:
        with self._changed:
            if site in self._begun:
                self._resting.add(site)
                self._changed.notify_all()

    def _trains(self, site: str, asked: Forward | Backward | None) -> Tensor | None:
        mine = self._ask(site, asked)
        try:
            while (wave := self._next_wave(site, mine)) is not None:
                self._answer(self._computed(wave))
        finally:
            with self._changed:
                self._asking.pop(site, None)
        if isinstance(mine.answer, Exception):
            raise mine.answer
        return mine.answer

    def _ask(self, site: str, asked: Forward | Backward | None) -> _Waiting:
        with self._changed:
            now = time.monotonic()
            self._came = self._came or now
            if not self._asking:
                self._since = now
            self._begun.add(site)
            self._resting.discard(site)
            mine = self._asking[site] = _Waiting(asked)
            self._changed.notify_all()
            return mine

    def _next_wave(self, site: str, mine: _Waiting) -> _Wave | None:
        """Wait until there is something for this thread to compute, or its site has its answer."""
        with self._changed:
            while not mine.done:
                self._go_on(site)
                now = time.monotonic()  # one for both, so that no moment falls between them
                if not self._computing and (wave := self._wave(now)):
                    self._computing = True
                    return wave
                self._changed.wait(self._patience(now))
            return None

    def _computed(self, wave: _Wave) -> dict[str, Answer | None]:
        """What came of it for every site; where it fails, all who are in it get the reason."""
        found: dict[str, Answer | None] = {}
        for group in self._groups(wave.forwards):
            found |= self._tried(lambda worker, there: worker.forward_all(there), group)
        if wave.backwards:
            passed = self._tried(lambda worker, there: worker.backward_all(there), wave.backwards)
            self._taught.update(site for site, one in passed.items() if isinstance(one, Tensor))
            found |= passed
        if wave.stepping:
            try:
                self._trainer.step(len(self._taught))
                found |= dict.fromkeys(wave.stepping)
            except Exception as error:  # raised again in the thread of each of them
                found |= dict.fromkeys(wave.stepping, error)
            self._taught.clear()
        return found

    def _tried(
        self, work: Callable[[MiddleWorker, list[Asked]], Sequence[Answer]], asked: Sequence[Asked]
    ) -> dict[str, Answer]:
        """Answers by site, or the reason why there is none."""

        def passed(worker: MiddleWorker) -> dict[str, Answer]:
            # Whoever left since then has no graphs any more; none may be made for it either.
            there = [one for one in asked if one.site not in self._gone]
            return dict(zip((one.site for one in there), work(worker, there), strict=True))

        try:
            found = self._trainer.alone(passed)
        except Exception as error:  # raised again in the thread of each of them
            return {one.site: error for one in asked}
        return found | {one.site: SplitError(_LEFT) for one in asked if one.site not in found}

    def _groups(self, asked: Sequence[Forward]) -> Iterator[list[Forward]]:
        """In their order, as many at a time as fit into `join_tokens` when padded."""
        group: list[Forward] = []
        for one in asked:
            length = max(each.mask.shape[1] for each in [*group, one])
            rows = sum(len(each.mask) for each in [*group, one])
            if group and rows * length > self._settings.join_tokens:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _answer(self, found: Mapping[str, Answer | None]) -> None:
        with self._changed:
            for site, answer in found.items():
                waiting = self._asking.pop(site, None)
                if waiting is not None:
                    waiting.answer, waiting.done = answer, True
            self._computing = False
            self._since = time.monotonic()
            self._changed.notify_all()

    def _left(self, since: float, now: float) -> float:
        """Seconds left of waiting since then, or less than 0."""
        return since + self._settings.wait_s - now

    def _missing(self, now: float) -> list[str]:
        """Sites that take part and have not asked yet."""
        here = self._open.keys() if self._left(self._came, now) <= 0 else set(self._sites)
        away = self._gone | self._resting | self._asking.keys()
        missing = [site for site in self._sites if site in here and site not in away]
        self._drop_stalled(missing)
        return [s for s in missing if s not in self._gone and self._worth(s, now) > 0]

    def _worth(self, site: str, now: float) -> float:
        """Seconds that a missing site is still waited for, whatever it says; less than 0: no more.

        One that takes longer is not left out: it goes on with whoever is there then.
        """
        if site in self._stepping:
            return self._hurry(site, now)
        if site in self._begun or site not in self._entered:
            return self._settings.stall_s
        return max(self._came, self._entered[site]) + self._settings.stall_s - now

    def _waits(self, missing: Sequence[str], now: float) -> bool:
        """Whether passes wait for those: always for one that has yet to begin."""
        late = self._left(self._since, now) <= 0
        return bool(missing) and (not late or any(site not in self._begun for site in missing))

    def _patience(self, now: float) -> float:
        """Seconds until waiting may be over; leaves out who stalls."""
        gone, missing = len(self._gone), self._missing(now)
        if len(self._gone) > gone:
            self._changed.notify_all()
            return 0.0
        waiting = (self._left(since, now) for since in (self._since, self._came))
        worth = (self._worth(site, now) for site in missing)
        stalling = self._drop_stalled(missing)
        return min([stalling, *worth, *(left for left in waiting if left > 0)])

    def _wave(self, now: float) -> _Wave | None:
        """What can be computed now."""
        missing = self._missing(now)
        if self._waits(missing, now):
            return None
        asked = {
            site: self._asking[site].asked
            for site in sorted(self._asking)
            if site not in self._gone  # its graphs may have been freed already
        }
        forwards = [one for one in asked.values() if isinstance(one, Forward)]
        backwards = [one for one in asked.values() if isinstance(one, Backward)]
        places = {one.place for one in backwards}
        whole = [
            one for one in backwards if places.issuperset(self._trainer.worker.partners(one.place))
        ]
        if forwards or whole:
            return _Wave(forwards, whole)
        if backwards:  # of some joined micro-batches only: the others are late, or come in turn
            return _Wave(backwards=backwards)
        return _Wave(stepping=tuple(asked)) if asked and not missing else None
