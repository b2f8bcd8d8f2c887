"""Schedules of a split round: how the sites share the server's blocks (Zheng et al. 2024).

One after another (`sequential`), all at once on one middle (`client_batch`), or all at once on
several, whose results are averaged when the round ends (`hierarchical`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import torch

from models.seeds import derive
from models.split.adapter import train_only
from models.split.cut import Middle
from models.split.joining import Joined
from models.split.link import Frames
from models.split.middle import Backward, Forward, MiddleWorker
from models.split.rounds import Learnt, Settings
from models.split.step import SplitError
from models.split.turns import Turns

__all__ = [
    "Choice", "Round", "Settings", "auto", "client_batch", "hierarchical", "sequential",
]  # fmt: skip

_REPEATS = 3


class Round(Protocol):
    """The middle during one round: serves its sites' streams, then gives what it learnt."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the middle, over all replicas."""

    @property
    def dropped(self) -> dict[str, str]:
        """Why sites left before their end."""

    def serve(self, site: str, frames: Frames) -> Frames:
        """Answer a site's frames, in a thread of its own; raises SplitError, WireError."""

    def absent(self, site: str, why: str) -> None:
        """Do not wait for a site that will not come, or go on; its stream is ended."""

    def finish(self) -> list[Learnt]:
        """End the round; what replicas trained."""

    def report(self) -> dict[str, float]:
        """Steps, passes, micro-batches joined per pass, share of padding, most graphs at a time."""


def sequential(middles: Sequence[Middle], sites: Sequence[str], settings: Settings) -> Round:
    """A round in which the sites take turns, by name, on the first of `middles`."""
    return Turns(middles[0], sites, settings)


def client_batch(middles: Sequence[Middle], sites: Sequence[str], settings: Settings) -> Round:
    """A round in which all sites train at once, joined, on the first of `middles`."""
    return Joined(middles[0], sites, settings)


def hierarchical(middles: Sequence[Middle], sites: Sequence[str], settings: Settings) -> Round:
    """A round in which `middles` share the sites, dealt by name, each joining its own."""
    return _Replicas(middles, sites, settings)


class _Replicas:
    """Several middles, each with its share of the sites."""

    def __init__(self, middles: Sequence[Middle], sites: Sequence[str], settings: Settings) -> None:
        shares = [share for share in _dealt(sites, len(middles)) if share]
        drawing = Lock()
        self._rounds = [
            Joined(middle, share, replace(settings, seed=derive(settings.seed, at)), drawing)
            for at, (middle, share) in enumerate(zip(middles, shares, strict=False))
        ]
        self._of = {
            site: round_
            for round_, share in zip(self._rounds, shares, strict=True)
            for site in share
        }

    @property
    def steps(self) -> int:
        return sum(round_.steps for round_ in self._rounds)

    @property
    def dropped(self) -> dict[str, str]:
        return {site: why for round_ in self._rounds for site, why in round_.dropped.items()}

    def serve(self, site: str, frames: Frames) -> Frames:
        if site not in self._of:
            raise SplitError(f"Expected a site of this round, got {site!r}.")
        return self._of[site].serve(site, frames)

    def absent(self, site: str, why: str) -> None:
        self._of[site].absent(site, why)

    def finish(self) -> list[Learnt]:
        """What each replica trained that took a step; the others have learnt nothing."""
        ended = [(round_, round_.finish()) for round_ in self._rounds]
        return [each for round_, learnt in ended if round_.steps for each in learnt]

    def report(self) -> dict[str, float]:
        reports = [round_.report() for round_ in self._rounds]
        passes = max(sum(report["passes"] for report in reports), 1)

        def mean(key: str) -> float:
            return sum(report[key] * report["passes"] for report in reports) / passes

        return {
            "steps": self.steps,
            "passes": sum(report["passes"] for report in reports),
            "joined": mean("joined"),
            "padding": mean("padding"),
            "peak-graphs": sum(report["peak-graphs"] for report in reports),
        }


@dataclass(frozen=True)
class Choice:
    """Which of `client-batch` and `hierarchical` is faster, and the seconds per token of each."""

    schedule: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        """What was measured, in words."""
        found = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in self.seconds.items())
        return f"{self.schedule}: microseconds per token of the middle were {found}"


def auto(
    middles: Sequence[Middle], sites: Sequence[str], settings: Settings, *, rows: int, tokens: int
) -> Choice:
    """Measure a pass there and back, of random batches (rows, tokens) of all sites at once.

    Joined on the first of `middles`, and shared among all of them. Weights stay as they are.
    """
    shares = [share for share in _dealt(sites, len(middles)) if share]
    workers = [_Probe(middle, settings, rows, tokens) for middle in middles[: len(shares)]]
    joined = _best(lambda: workers[0](sites))
    with ThreadPoolExecutor(len(workers)) as threads:
        shared = _best(
            lambda: list(threads.map(lambda probe, share: probe(share), workers, shares))
        )
    total = len(sites) * rows * tokens
    seconds = {"client-batch": joined / total, "hierarchical": shared / total}
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds)


class _Probe:
    """Passes of random hidden states through a middle, as a round joins them."""

    def __init__(self, middle: Middle, settings: Settings, rows: int, tokens: int) -> None:
        train_only(middle, settings.trains)
        self._middle = middle
        self._device = next(middle.parameters()).device
        self._worker = MiddleWorker(
            middle, most=1, precision=settings.train.precision, seed=settings.seed
        )
        self._at_a_time = max(1, settings.join_tokens // (rows * tokens))
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (rows, tokens, settings.limits.hidden_size)
        self._hidden = torch.randn(shape, generator=generator)
        self._mask = torch.ones(rows, tokens, dtype=torch.long)

    def __call__(self, sites: Sequence[str]) -> None:
        for start in range(0, len(sites), self._at_a_time):
            group = sites[start : start + self._at_a_time]
            self._worker.forward_all([Forward(s, 0, self._hidden, self._mask) for s in group])
            self._worker.backward_all([Backward(s, 0, self._hidden) for s in group])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._middle.zero_grad(set_to_none=True)


def _best(work: Callable[[], object]) -> float:
    """Least seconds of a few times, after one to warm up."""
    work()
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _dealt(sites: Sequence[str], count: int) -> list[list[str]]:
    names = sorted(sites)
    return [names[at::count] for at in range(count)]
