"""One side of the benchmark of split training, in a process of its own.

Run as `python -m flower_app.bench.splitside ROLE FOLDER`: answers a line of JSON on standard input
by one on standard output, after `ready`. The role `sites` forks a process for each site, which
shares the memory of the weights.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from flower_app.split.stream import StreamServer, exchange
from models import base, payload
from models.batches import Batch
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.split.adapter import train_only
from models.split.cut import Middle
from models.split.link import FrameLink, Limits
from models.split.load import SERVER, SITE, Cuts, load_parts, load_split
from models.split.schedule import Round, Settings, client_batch, hierarchical, sequential
from models.split.site import SiteModel, SplitPayload, train_across
from models.train import train
from privacy.tls import Identity

SCHEDULES: Mapping[str, Callable[..., Round]] = {
    "sequential": sequential,
    "client-batch": client_batch,
    "hierarchical": hierarchical,
}
RATE = 1e-3
MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Task:
    """What is trained: `steps` after one to warm up, each of `micro` batches (rows, tokens).

    All sides use the same `cores`.
    """

    cores: Sequence[int]
    steps: int
    micro: int
    rows: int
    tokens: int
    hidden: int
    sites: int = 1
    schedule: str = "sequential"
    replicas: int = 1
    in_flight: int = 2
    wire: str = "bf16"
    threads: int = 1
    site_threads: int = 1

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [f"site {number}" for number in range(self.sites)]

    @property
    def limits(self) -> Limits:
        """What a message may hold."""
        return Limits(self.rows * self.tokens, self.hidden, self.wire)

    @property
    def train(self) -> TrainConfig:
        """The optimiser, the same on all sides."""
        return TrainConfig(grad_accumulation=self.micro, precision="float32")


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """Rows of random tokens, without padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (task.rows, task.tokens)
    while True:
        ids = torch.randint(5, 1000, shape, generator=generator)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        yield Batch(given, ids.numel(), ids.numel(), ids.numel(), ())


class Central:
    """The whole model in one process."""

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.model_validate({"name": str(folder / "model")})
        loaded = base.load(config, num_labels=0)
        self._payload = payload.attach(
            loaded.model, PayloadConfig(), task="causal-lm", fresh_modules=loaded.fresh_modules
        )
        self._start = self._payload.select()

    def __call__(self, task: Task, **_: Any) -> dict[str, Any]:
        """Seconds of wall and processor time, tokens, and the loss of the first step."""
        torch.set_num_threads(task.threads)
        self._payload.load(self._start)
        given = batches(task, 0)
        run = partial(train, self._payload, given, task.train, learning_rate=RATE)
        first = run(steps=1)
        cpu = time.process_time()
        found = run(steps=task.steps)
        return {
            "seconds": found.seconds,
            "cpu": time.process_time() - cpu,
            "tokens": found.tokens,
            "loss": first.loss,
        }


class Server:
    """The middle and its stream: opened by one command, closed by the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[Round, StreamServer, float] | None = None

    def __call__(self, task: Task, **_: Any) -> dict[str, Any]:
        """The port it listens at; the next time what the round was like."""
        if self._open is None:
            return {"port": self._start(task)}
        (round_, server, cpu), self._open = self._open, None
        round_.finish()
        server.stop()
        return round_.report() | {"cpu": time.process_time() - cpu, "dropped": round_.dropped}

    def _start(self, task: Task) -> int:
        torch.set_num_threads(task.threads)
        middles = [self._middle() for _ in range(task.replicas)]
        settings = Settings(task.limits, task.train, RATE, most_graphs=task.in_flight)
        round_ = SCHEDULES[task.schedule](middles, task.names, settings)
        keys = identities(self._folder)
        sites = {name: keys[name].certificate for name in task.names}
        server = StreamServer(keys["server"], sites, round_.serve, max_bytes=MOST_BYTES)
        self._open = (round_, server, time.process_time())
        return int(server.port)

    def _middle(self) -> Middle:
        found = load_parts(self._folder / "model", SERVER, Cuts(), payload=PayloadConfig())
        middle = found["middle"]
        assert isinstance(middle, Middle)
        return middle


class Sites:
    """Head and tail, in a process for each site."""

    def __init__(self, folder: Path) -> None:
        parts, settings = load_split(folder / "model", SITE, Cuts(), payload=PayloadConfig())
        assert settings is not None
        for part in (parts.head, parts.tail):
            train_only(part, "lora")
        self._payload = SplitPayload(SiteModel(parts.head, parts.tail), settings, "", ())
        self._keys = identities(folder)

    def __call__(self, task: Task, port: int, **_: Any) -> dict[str, Any]:
        """What `Central` gives, of all sites together, and the bytes in their frames."""
        forks = multiprocessing.get_context("fork")
        started, pipes = [], []
        for number in range(task.sites):
            ours, theirs = forks.Pipe()
            process = forks.Process(target=self._site, args=(task, number, port, theirs))
            process.start()
            theirs.close()  # so that a site that fails ends the pipe
            started.append(process)
            pipes.append(ours)
        found: list[dict[str, Any]] = [pipe.recv() for pipe in pipes]
        for process in started:
            process.join()
        return {
            "seconds": max(f["ended"] for f in found) - min(f["began"] for f in found),
            "cpu": sum(f["cpu"] for f in found),
            "tokens": sum(f["tokens"] for f in found),
            "bytes": sum(f["bytes"] for f in found),
            "loss": found[0]["loss"],
        }

    def _site(self, task: Task, number: int, port: int, results: Connection) -> None:
        torch.set_num_threads(task.site_threads)
        own, server = self._keys[task.names[number]], self._keys["server"].certificate
        ask = partial(
            exchange, f"127.0.0.1:{port}", own, server, max_bytes=MOST_BYTES, timeout=600.0
        )
        with FrameLink(ask, task.limits) as link:
            results.send(_train(self._payload, link, task, number))


def _train(payload: SplitPayload, link: FrameLink, task: Task, seed: int) -> dict[str, float]:
    payload.module.link = link
    run = partial(
        train_across, payload, batches(task, seed), task.train, learning_rate=RATE,
        in_flight=task.in_flight,
    )  # fmt: skip
    first = run(steps=1)
    began, cpu, sent = time.monotonic(), time.process_time(), link.bytes_up + link.bytes_down
    found = run(steps=task.steps)
    return {
        "began": began,
        "ended": time.monotonic(),
        "cpu": time.process_time() - cpu,
        "tokens": found.tokens,
        "bytes": link.bytes_up + link.bytes_down - sent,
        "loss": first.loss,
    }


def write_identities(folder: Path, names: list[str]) -> None:
    """Keys of a run for these names."""
    for name in names:
        found = Identity.fresh()
        (folder / f"{name}.key").write_bytes(found.key)
        (folder / f"{name}.pem").write_bytes(found.certificate)


def identities(folder: Path) -> dict[str, Identity]:
    """The keys in a folder."""
    return {
        path.stem: Identity(path.read_bytes(), path.with_suffix(".pem").read_bytes())
        for path in sorted(folder.glob("*.key"))
    }


ROLES: Mapping[str, Callable[[Path], Callable[..., dict[str, Any]]]] = {
    "central": Central,
    "server": Server,
    "sites": Sites,
}


def main() -> None:
    """One process; see the module's docstring."""
    role, folder = sys.argv[1:]
    torch.set_num_threads(1)
    side = ROLES[role](Path(folder))
    print("ready", flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        task = Task(**given.pop("task"))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), task.cores)
        print(json.dumps(side(task, **given)), flush=True)


if __name__ == "__main__":
    main()
