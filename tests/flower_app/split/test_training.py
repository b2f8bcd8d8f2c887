"""Sites train across the cut over the real stream, on one machine."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch

from flower_app.bench.proxy import DelayingProxy
from flower_app.split.stream import StreamError, StreamServer, exchange
from models.payload import Payload
from models.split import cut
from models.split.link import FrameLink
from models.split.messages import Kind, Message
from models.split.schedule import Round, client_batch, sequential
from models.train import train
from privacy.tls import HOST, Identity
from tests.models.split.families import tiny
from tests.models.split.sites import LIMITS, PLAIN, in_threads, settings, train_over
from tests.models.split.test_step import NO_DROPOUT, batches

pytestmark = pytest.mark.usefixtures("one_thread")
MOST = 100_000


def link_to(server: StreamServer, own: Identity, certificate: bytes) -> FrameLink:
    ask = partial(
        exchange, f"127.0.0.1:{server.port}", own, certificate, max_bytes=MOST, timeout=60
    )
    return FrameLink(ask, LIMITS)


def served(round_: Round, sites: dict[str, Identity], own: Identity) -> StreamServer:
    certificates = {name: identity.certificate for name, identity in sites.items()}
    return StreamServer(own, certificates, round_.serve, max_bytes=MOST)


def identities(*names: str) -> tuple[Identity, dict[str, Identity]]:
    return Identity.fresh(), {name: Identity.fresh() for name in names}


@pytest.mark.parametrize("schedule", [sequential, client_batch])
def test_a_site_trains_over_the_stream_while_another_dies(schedule: Callable[..., Round]) -> None:
    whole = tiny("llama", tie_word_embeddings=False, **NO_DROPOUT)
    parts = cut(copy.deepcopy(whole))
    central = train(
        Payload("full", whole), batches("llama"), PLAIN, steps=20, learning_rate=0.05, seed=1
    )
    round_ = schedule([parts.middle], ["north", "south"], settings())
    own, keys = identities("north", "south")
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)

    def dies(step: int) -> None:
        if step == 2:
            south.close()

    with served(round_, keys, own) as server:
        south = link_to(server, keys["south"], own.certificate)
        waiting = south.forward(1, hidden, mask)  # nobody will ask for its gradients
        if schedule is client_batch:
            south.close()
        with link_to(server, keys["north"], own.certificate) as north:
            split = train_over(north, parts, batches("llama"), steps=20, in_flight=2, after=dies)
        waiting.exception(timeout=20)
        left = time.monotonic() + 10
        while "south" not in round_.dropped and time.monotonic() < left:
            time.sleep(0.005)
    assert split.loss == pytest.approx(central.loss, abs=1e-5)
    assert round_.steps == 20 and "south" in round_.dropped


SITE_THAT_DIES = """
import sys, time
import grpc

address, host, path, *files = sys.argv[1:]
frame, key, own, server = (open(name, "rb").read() for name in files)
credentials = grpc.ssl_channel_credentials(server, key, own)
channel = grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", host)])

def frames():
    yield frame
    time.sleep(600)

for answer in channel.stream_stream(path)(frames()):
    print("answered", flush=True)
"""


def test_a_site_killed_in_mid_step_stalls_no_one_and_leaves_no_graph(tmp_path: Path) -> None:
    parts = cut(tiny("llama", tie_word_embeddings=False))
    round_ = client_batch([parts.middle], ["north", "south"], settings())
    worker = round_._trainer.worker  # type: ignore[attr-defined]
    own, keys = identities("north", "south")
    frame = Message(Kind.FORWARD, 1, torch.zeros(1, 3, 32), torch.ones(1, 3)).encode("fp32")
    south = keys["south"]
    files = {"frame": frame, "key": south.key, "own": south.certificate, "its": own.certificate}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with served(round_, keys, own) as server:
        where = [f"127.0.0.1:{server.port}", HOST, "/florilegium.Split/Frames"]
        site = subprocess.Popen(
            [sys.executable, "-c", SITE_THAT_DIES, *where, *(tmp_path / name for name in files)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert site.stdout is not None
        with link_to(server, keys["north"], own.certificate) as north:
            (trained,) = in_threads([lambda: train_over(north, parts, batches("llama"), steps=3)])
            assert site.stdout.readline() == "answered\n"
            assert len(worker) >= 1 and not trained.done()
            site.kill()
            site.wait(20)
            assert trained.result(timeout=20).steps == 3
        site.stdout.close()
    assert round_.dropped.keys() == {"south"} and len(worker) == 0


def test_a_question_that_lies_ends_its_own_stream() -> None:
    round_ = client_batch([cut(tiny("llama")).middle], ["north", "south"], settings(wait_s=0.05))
    own, keys = identities("north", "south")
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)
    with (
        served(round_, keys, own) as server,
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
    assert "Expected 384 bytes of fp32" in round_.dropped["north"]


def test_a_listener_sees_nothing_of_what_crosses_the_cut() -> None:
    parts = cut(tiny("llama", tie_word_embeddings=False))
    round_ = sequential([parts.middle], ["north"], settings())
    own, keys = identities("north")
    seen: list[bytes] = []
    frames: list[bytes] = []

    def kept(passing: Iterator[bytes]) -> Iterator[bytes]:
        for frame in passing:
            frames.append(frame)
            yield frame

    def ask(sent: Iterator[bytes]) -> Iterator[bytes]:
        address = f"127.0.0.1:{proxy.port}"
        return kept(exchange(address, keys["north"], own.certificate, kept(sent), max_bytes=MOST))

    with (
        served(round_, keys, own) as server,
        DelayingProxy(server.port, seen=seen.append) as proxy,
        FrameLink(ask, LIMITS) as link,
    ):
        train_over(link, parts, batches("llama"), steps=1)
    passed = b"".join(seen)
    assert len(frames) == 2 * (2 * 2 + 1) and len(passed) > sum(map(len, frames))
    windows = {frame[at : at + 12] for frame in frames for at in range(0, len(frame) - 12, 40)}
    windows.discard(bytes(12))
    assert len(windows) > 100 and not any(window in passed for window in windows)


def test_a_site_that_stalls_is_told_at_once() -> None:
    round_ = client_batch([cut(tiny("llama")).middle], ["north"], settings(stall_s=0.2))
    own, keys = identities("north")
    hidden, mask = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.int64)
    with (
        served(round_, keys, own) as server,
        link_to(server, keys["north"], own.certificate) as north,
    ):
        north.forward(1, hidden, mask).result(timeout=20)
        north._reader.join(timeout=20)  # the stream ends without another question
        assert not north._reader.is_alive()
        with pytest.raises(StreamError, match="ABORTED"):
            north.forward(2, hidden, mask).result(timeout=20)
    assert round_.dropped == {"north": "it said nothing for 0.2 s"}


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
