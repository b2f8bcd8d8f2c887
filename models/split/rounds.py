"""What the schedules of a split round share: its settings, its streams, and the training itself.

Every stream is read by a thread of its own, one or two frames ahead, so that a site that stalls, or
is to be left out, can be told so at any time. Graphs of a site that is gone are freed.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition, Lock
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from models.config import TrainConfig
from models.seeds import derive
from models.split.adapter import factors, train_only
from models.split.cut import Middle, twin
from models.split.inbox import Inbox
from models.split.link import Frames, Limits
from models.split.messages import Kind, Message
from models.split.middle import Backward, Forward, MiddleWorker, size_of
from models.split.step import SplitError
from models.train import optimizer_of

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
OVER = "Expected questions before the end of the round; it is over."


@dataclass(frozen=True)
class Settings:
    """How the middle is trained, and how long it waits for whom.

    `most_graphs` micro-batches of a site may be under way at a time; `join_tokens`, padding
    included, go into one pass. `wait_s` is how long those who are there wait for one who is not,
    `stall_s` how long a site may say nothing, score before it trains, or compute in a step.
    """

    limits: Limits
    train: TrainConfig
    learning_rate: float
    trains: Literal["lora", "full", "none"] = "lora"
    most_graphs: int = 8
    join_tokens: int = 16_384
    wait_s: float = 60.0
    stall_s: float = 300.0
    seed: int = 0


class Learnt(NamedTuple):
    """What a middle trained, by the names of the whole model's adapter, and with how many sites."""

    tensors: dict[str, Tensor]
    sites: int


class Trainer:
    """A middle with its optimiser and its graphs, used by one at a time.

    All passes are computed in one thread: each thread has memory of its own for what a pass leaves
    behind, and the streams' threads together would have as many times as much.
    """

    def __init__(self, middle: Middle, settings: Settings, drawing: Lock | None = None) -> None:
        train_only(middle, settings.trains)
        self._middle = middle.train()
        self._settings = settings
        scorer = twin(middle)
        scorer.eval()
        self.worker = MiddleWorker(
            middle, most=settings.most_graphs, precision=settings.train.precision, scorer=scorer,
            seed=settings.seed, drawing=drawing,
        )  # fmt: skip
        self._trained = [p for p in middle.parameters() if p.requires_grad]
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "middle")
        self._optimizer: torch.optim.Optimizer | None = None
        self._over = False
        self.steps = 0
        self.fresh()

    def alone(self, work: Callable[[MiddleWorker], T]) -> T:
        """What `work` gives, which has the middle for itself meanwhile; raises what it raises."""
        with self._lock:
            self._check()
            return self._thread.submit(work, self.worker).result()

    def fresh(self) -> None:
        """Start a new optimiser, and drop gradients of a step that was not taken."""
        with self._lock:
            self._drop_gradients()
            if self._trained:
                settings = self._settings
                self._optimizer = optimizer_of(
                    settings.train, self._trained, settings.learning_rate
                )

    def step(self, count: int) -> None:
        """An optimiser step on the mean of the gradients of `count` sites, if it is finite."""
        with self._lock:
            self._check()
            gradients = [p.grad for p in self._trained if p.grad is not None]
            if self._optimizer is None or not gradients:
                self.steps += 1
                return
            for gradient in gradients if count > 1 else ():
                gradient.div_(count)
            norm = size_of(gradients)
            if not bool(norm.isfinite()):
                _LOG.warning("A step of the middle is left out: its gradient is not finite.")
                self._drop_gradients()
                return
            if most := self._settings.train.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self._trained, most, norm)
            self._optimizer.step()
            self.steps += 1
            self._drop_gradients()

    def forget(self, site: str) -> None:
        """Free the graphs of a site."""
        with self._lock:
            self.worker.forget(site)

    def trained(self) -> dict[str, Tensor]:
        """Copies of what was trained, by the names of the whole model's adapter."""
        with self._lock:
            self._over = True  # what is still to be computed must not change the weights any more
            self._thread.shutdown()
            self._drop_gradients()
            return factors(self._middle)

    def _check(self) -> None:
        if self._over:
            raise SplitError(OVER)

    def _drop_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None


class Streams(ABC):
    """The streams of a round's sites, from the first frame to the last.

    `dropped` says why a site left before its end. A site has one stream per round; what a broken
    one had trained stays in the middle.
    """

    def __init__(
        self,
        middle: Middle,
        sites: Sequence[str],
        settings: Settings,
        drawing: Lock | None = None,
    ) -> None:
        self._sites = sorted(sites)
        self._settings = settings
        self._trainer = Trainer(middle, settings, drawing)
        self._changed = Condition()
        self._open: dict[str, Inbox] = {}
        self._silent: dict[str, float] = {}  # since when a site's next frame is waited for
        self._entered: dict[str, float] = {}  # when a site's stream was opened
        self._stepping: dict[str, int] = {}  # micro-batches of the step that a site is in
        self._stepped: set[str] = set()  # sites that came to the end of a step
        self._slow: dict[str, float] = {}  # seconds that it took for its own part of that step
        self._gone: set[str] = set()
        self._over: SplitError | None = None
        self.dropped: dict[str, str] = {}

    @property
    def steps(self) -> int:
        """Optimiser steps of the middle."""
        return self._trainer.steps

    def report(self) -> dict[str, float]:
        """What was joined: micro-batches per pass, share of padding, most graphs at a time."""
        worker = self._trainer.worker
        return {
            "steps": self.steps,
            "passes": worker.passes,
            "joined": worker.joined / max(worker.passes, 1),
            "padding": worker.padding / max(worker.tokens, 1),
            "peak-graphs": worker.peak,
        }

    def serve(self, site: str, frames: Frames) -> Frames:
        """Answer a site's frames until they end; raises SplitError, WireError for bad ones."""
        inbox = self._enter(site, frames)
        why = "its stream broke"
        precision = self._settings.limits.precision
        seed = derive(self._settings.seed, "rounding", site)
        generator = torch.Generator().manual_seed(seed)
        try:
            while (frame := self._next(site, inbox)) is not None:
                answer = self._answered(site, self._settings.limits.decode(frame))
                data = answer.encode(precision, generator)
                self._expects(site)
                yield data
            why = "it ended its stream in mid-step" if site in self._stepping else ""
        except Exception as error:
            why = str(error) or why
            raise
        finally:
            inbox.close()
            self._leave(site, why)

    def absent(self, site: str, why: str) -> None:
        """Do not wait for a site that will not come, or go on; its stream is ended."""
        with self._changed:
            inbox = self._open.get(site)
        if inbox is not None:
            inbox.close(SplitError(why))
        self._leave(site, why)

    def finish(self) -> list[Learnt]:
        """End the round for all; what was trained."""
        with self._changed:
            self._over = SplitError(OVER)
            for site, inbox in self._open.items():  # those at rest have nothing to be told
                inbox.close(self._over if site in self._stepping else None)
            self._changed.notify_all()
            sites = len(self._stepped)
        return [Learnt(self._trainer.trained(), max(sites, 1))]

    @abstractmethod
    def _trains(self, site: str, asked: Forward | Backward | None) -> Tensor | None:
        """Answer a pass, or take a step (None), when it is this site's turn."""

    def _rests(self, site: str) -> None:  # noqa: B027 - what most schedules do not mind
        """A site scores held-out rows, between steps."""

    def _enter(self, site: str, frames: Frames) -> Inbox:
        with self._changed:
            self._go_on(site)
            if site not in self._sites:
                raise SplitError(f"Expected a site of this round, got {site!r}.")
            if site in self._open or site in self._gone:
                raise SplitError(f"Expected one stream of {site!r} in a round, got another.")
            inbox = self._open[site] = Inbox(frames)
            self._entered[site] = time.monotonic()
        self._expects(site)
        return inbox

    def _leave(self, site: str, why: str) -> None:
        with self._changed:
            if why and self._over is None:
                self.dropped.setdefault(site, why)
            self._gone.add(site)
            for known in (self._open, self._silent):
                known.pop(site, None)
            self._stepping.pop(site, None)
            self._changed.notify_all()
        self._trainer.forget(site)

    def _expects(self, site: str) -> None:
        """From now on, a site's next frame is waited for."""
        with self._changed:
            self._go_on(site)
            self._silent[site] = time.monotonic()
            self._changed.notify_all()

    def _next(self, site: str, inbox: Inbox) -> bytes | None:
        try:
            frame = inbox.next(self._settings.stall_s)
        except TimeoutError:
            raise self._stalled() from None
        with self._changed:
            if frame is not None:
                self._go_on(site)
            since = self._silent.pop(site, None)
            if since is not None and site in self._stepping:
                self._slow[site] = self._slow.get(site, 0.0) + time.monotonic() - since
        return frame

    def _answered(self, site: str, question: Message) -> Message:
        key, kind, values, mask = question.key, question.kind, question.values, question.mask
        if kind is Kind.SCORE and values is not None and mask is not None:
            if site in self._stepping:  # the others may be waiting for its step
                raise SplitError(f"Expected no held-out rows in a step, got some of {site!r}.")
            self._rests(site)
            return Message(Kind.SCORED, key, self._trainer.worker.score(values, mask))
        if kind is Kind.FORWARD and values is not None and mask is not None:
            return Message(Kind.HIDDEN, key, self._pass(site, Forward(site, key, values, mask)))
        if kind is Kind.BACKWARD and values is not None:
            return Message(Kind.GRADIENT, key, self._pass(site, Backward(site, key, values)))
        if kind is not Kind.STEP:
            raise SplitError(f"Expected a question of {site!r}, got {kind.name}.")
        if left := self._trainer.worker.under_way(site):
            raise SplitError(
                f"Expected all gradients of a step before it, got STEP of {site!r} with {left} "
                "micro-batches under way."
            )
        with self._changed:
            self._stepped.add(site)
        self._trains(site, None)
        with self._changed:
            self._stepping.pop(site, None)
            self._slow.pop(site, None)
        return Message(Kind.STEPPED, key)

    def _pass(self, site: str, asked: Forward | Backward) -> Tensor:
        self._trainer.worker.check(asked)
        with self._changed:
            count = self._stepping.get(site, 0) + isinstance(asked, Forward)
            if count > (most := self._settings.train.grad_accumulation):
                raise SplitError(
                    f"Expected at most train.grad-accumulation={most} micro-batches in a step, got "
                    f"one more by {site!r}; give both sides the same configuration."
                )
            self._stepping[site] = count
        found = self._trains(site, asked)
        assert found is not None
        return found

    def _go_on(self, site: str) -> None:
        """Raise why a site may not."""
        if self._over is not None:
            raise self._over
        if site in self._gone and site in self.dropped:
            raise SplitError(self.dropped[site])

    def _drop_stalled(self, sites: Sequence[str]) -> float:
        """Leave out those of the sites that stall; seconds until the next one would."""
        now, left = time.monotonic(), self._settings.stall_s
        for site in sites:
            if site not in self._silent:
                continue
            remaining = self._silent[site] + self._settings.stall_s - now
            if remaining > 0:
                left = min(left, remaining)
                continue
            reason = self._stalled()
            self.dropped.setdefault(site, str(reason))
            self._gone.add(site)
            self._open.pop(site).close(reason)
            self._silent.pop(site)
            self._trainer.forget(site)  # its own thread may hang in an answer nobody takes
        return left

    def _hurry(self, site: str, now: float) -> float:
        """Seconds that are left to a site in a step for its own part of it, or less than 0."""
        silent = now - self._silent.get(site, now)
        return self._settings.stall_s - self._slow.get(site, 0.0) - silent

    def _stalled(self) -> SplitError:
        return SplitError(f"it said nothing for {self._settings.stall_s:g} s")
