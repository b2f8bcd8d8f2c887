"""Sites that train across the cut in threads of their own, for the tests of what serves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import nn

from models.batches import Batch
from models.config import TrainConfig
from models.payload import Payload
from models.split import Parts
from models.split.cut import Middle
from models.split.link import FrameLink, Frames, Limits
from models.split.rounds import Settings
from models.split.schedule import Round
from models.split.step import SiteStep
from models.train import Step, Trained, optimise
from tests.models.split.test_step import batches

LIMITS = Limits(99, 32, "fp32")
PLAIN = TrainConfig(optimizer="sgd", max_grad_norm=0.0, grad_accumulation=2, precision="float32")
RATE = 0.05


def settings(**keys: Any) -> Settings:
    """Plain steps on all of the middle's weights, and nobody waits for long."""
    given = {"limits": LIMITS, "train": PLAIN, "learning_rate": RATE, "trains": "full"}
    return Settings(**given | {"wait_s": 20.0, "stall_s": 20.0} | keys)


def middles(parts: Parts, count: int) -> list[Middle]:
    """A middle and copies of it."""
    return [copy.deepcopy(parts.middle) for _ in range(count)]


def stream(family: str, first: int, every: int = 1) -> Iterator[Batch]:
    """The batches of one of several sites, of different lengths where `first` differs."""
    for at, batch in enumerate(batches(family)):
        if at % every == first % every:
            yield shortened(batch, first % 3) if family != "bert" else batch


def shortened(batch: Batch, by: int) -> Batch:
    """The same without the last tokens, so that joined batches are of unequal length."""
    inputs = {name: t[:, : t.shape[1] - by] for name, t in batch.inputs.items()}
    counted = int((inputs["labels"] != -100).sum())
    return Batch(inputs, counted, inputs["input_ids"].numel(), counted, batch.rows)


def train_over(
    link: FrameLink,
    parts: Parts,
    given: Iterator[Batch],
    *,
    config: TrainConfig = PLAIN,
    steps: int = 3,
    in_flight: int = 1,
    after: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train head and tail over a link; `after` is called with the number of each step."""
    step = SiteStep(
        parts.head, parts.tail, link, given, accumulation=config.grad_accumulation,
        in_flight=in_flight, precision=config.precision,
    )  # fmt: skip
    site = Payload("full", nn.ModuleDict({"head": parts.head, "tail": parts.tail}))
    done = 0

    def gradient() -> Step:
        nonlocal done
        done += 1
        found = step()
        link.step(done).result(timeout=20)
        after(done)
        return found

    return optimise(site, gradient, config, steps=steps, learning_rate=RATE, seed=1)


def in_threads(works: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
    """Start all; each Future holds what came of one, or the error."""
    found: list[Future[Any]] = []
    for work in works:
        future: Future[Any] = Future()

        def run(work: Callable[[], Any] = work, future: Future[Any] = future) -> None:
            torch.set_num_threads(1)
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        found.append(future)
    return found


def linked(round_: Round, site: str, limits: Limits = LIMITS) -> FrameLink:
    """A link to a round, without any transport between."""

    def served(frames: Frames) -> Frames:
        return round_.serve(site, frames)

    return FrameLink(served, limits)
