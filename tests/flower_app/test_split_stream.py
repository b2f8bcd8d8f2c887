"""Sites train across the cut over the real stream, on one machine."""

from __future__ import annotations

import copy
from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn

from flower_app.stream import StreamError, StreamServer, exchange
from models.config import TrainConfig
from models.payload import Payload
from models.split import cut
from models.split.link import FrameLink, Limits, MiddleService
from models.split.messages import Kind, Message
from models.split.step import MiddleWorker, SiteStep
from models.train import Step, optimise, train
from privacy.tls import Identity
from tests.models.split.families import tiny
from tests.models.split.test_step import NO_DROPOUT, batches

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(27, 32, "fp32")
PLAIN = TrainConfig(optimizer="sgd", max_grad_norm=0.0, grad_accumulation=4, precision="float32")
MOST = 100_000


def link_to(server: StreamServer, own: Identity, certificate: bytes) -> FrameLink:
    ask = partial(
        exchange, f"127.0.0.1:{server.port}", own, certificate, max_bytes=MOST, timeout=60
    )
    return FrameLink(ask, LIMITS)


def test_a_site_trains_over_the_stream_while_another_dies() -> None:
    whole = tiny("llama", tie_word_embeddings=False, **NO_DROPOUT)
    parts = cut(copy.deepcopy(whole))
    central = train(
        Payload("full", whole), batches("llama"), PLAIN, steps=5, learning_rate=0.05, seed=1
    )
    middle = torch.optim.SGD(parts.middle.parameters(), lr=0.05)

    def stepped(site: str) -> None:
        middle.step()
        middle.zero_grad()

    worker = MiddleWorker(parts.middle, most=8)
    service = MiddleService(worker, stepped, LIMITS)
    own, keys = Identity.fresh(), {name: Identity.fresh() for name in ("north", "south")}
    certificates = {name: identity.certificate for name, identity in keys.items()}
    site = Payload("full", nn.ModuleDict({"head": parts.head, "tail": parts.tail}))
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)

    with StreamServer(own, certificates, service.serve, max_bytes=MOST) as server:
        south = link_to(server, keys["south"], own.certificate)
        south.forward(1, hidden, mask).result(timeout=20)
        assert len(worker) == 1  # a graph that nobody will ask for again
        with link_to(server, keys["north"], own.certificate) as north:
            step = SiteStep(
                parts.head, parts.tail, north, batches("llama"), accumulation=4, in_flight=3
            )
            number = 0

            def gradient() -> Step:
                nonlocal number
                number += 1
                found = step()
                north.step(number).result(timeout=20)
                if number == 2:
                    south.close()
                return found

            split = optimise(site, gradient, PLAIN, steps=5, learning_rate=0.05, seed=1)
    assert split.loss == pytest.approx(central.loss, abs=1e-5)
    assert len(worker) == 0


def test_a_question_that_lies_ends_its_own_stream() -> None:
    service = MiddleService(
        MiddleWorker(cut(tiny("llama")).middle, most=2), lambda site: None, LIMITS
    )
    own, keys = Identity.fresh(), {name: Identity.fresh() for name in ("north", "south")}
    certificates = {name: identity.certificate for name, identity in keys.items()}
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)
    with (
        StreamServer(own, certificates, service.serve, max_bytes=MOST) as server,
        link_to(server, keys["south"], own.certificate) as south,
    ):
        south.forward(1, hidden, mask).result(timeout=20)
        lying = iter([Message(Kind.FORWARD, 1, hidden, mask).encode("fp32")[:-1]])
        north = keys["north"]
        answers = exchange(
            f"127.0.0.1:{server.port}", north, own.certificate, lying, max_bytes=MOST, timeout=20
        )
        with pytest.raises(StreamError, match="ABORTED"):
            next(answers)
        south.backward(1, hidden).result(timeout=20)


def test_the_server_stops_while_a_site_waits() -> None:
    held: list[Thread] = []

    def stalls(site: str, frames: object) -> object:
        for _ in frames:  # type: ignore[attr-defined]
            held.append(Thread(target=server.stop, daemon=True))
            held[-1].start()
            held[-1].join(timeout=5)
            yield b""

    own, keys = Identity.fresh(), {"north": Identity.fresh()}
    server = StreamServer(
        own,
        {"north": keys["north"].certificate},
        stalls,
        max_bytes=MOST,  # type: ignore[arg-type]
    )
    with link_to(server, keys["north"], own.certificate) as north, pytest.raises(StreamError):
        north.forward(1, torch.zeros(1, 3, 32), torch.ones(1, 3)).result(timeout=30)
