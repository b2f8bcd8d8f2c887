"""The benchmark of split training: its proxy delays, its sides do the same, its ratios add up."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flower_app.bench import split
from flower_app.bench.bases import Shape, save_base
from flower_app.bench.proxy import DelayingProxy
from flower_app.bench.splitside import Central, Server, Sites, Task, write_identities

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Shape("tiny", 32, 4, 4, 4, 48, 1000)


def echo(listener: socket.socket) -> None:
    one, _ = listener.accept()
    while chunk := one.recv(1024):
        one.sendall(chunk)
    one.close()


def test_the_proxy_delays_what_passes_in_both_directions_and_counts_it() -> None:
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        with (
            DelayingProxy(listener.getsockname()[1], 0.1, seen.append) as proxy,
            socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as ours,
        ):
            began = time.monotonic()
            for word in (b"one", b"two"):  # the second does not wait for the first
                ours.sendall(word)
                time.sleep(0.01)
            found = b""
            while len(found) < 6:
                found += ours.recv(6)
            took = time.monotonic() - began
            ours.shutdown(socket.SHUT_WR)
            assert ours.recv(1) == b""  # the end comes through
    assert found == b"onetwo" and 0.1 <= took < 5
    assert proxy.passed == 12 and sorted(b"".join(seen)) == sorted(2 * b"onetwo")


def test_both_sides_train_the_same(tmp_path: Path) -> None:
    """The sites are run here, not forked: a test has threads, and a fork would lose them."""
    save_base(tmp_path / "model", TINY, ["a text"])
    task = Task([0], steps=2, micro=2, rows=2, tokens=8, hidden=32, sites=2, wire="fp32")
    write_identities(tmp_path, ["server", *task.names])
    central = Central(tmp_path)(task)
    again = Central(tmp_path)(task)
    assert central["loss"] == again["loss"] and central["tokens"] == 2 * 2 * 2 * 8
    server, sites = Server(tmp_path), Sites(tmp_path)
    port = server(task)["port"]
    results: list[dict[str, float]] = []

    class Pipe:
        send = staticmethod(results.append)

    for number in range(2):
        sites._site(task, number, port, Pipe)  # type: ignore[arg-type]
    report = server(task)
    assert report["dropped"] == {} and report["steps"] == 2 * 3
    assert results[0]["loss"] == pytest.approx(central["loss"], abs=1e-5)
    assert [found["tokens"] for found in results] == [central["tokens"]] * 2
    floor = 4 * 4 * 32 * central["tokens"]
    assert floor < results[0]["bytes"] < 1.1 * floor


def run(seconds: float, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "cpu": 2 * seconds, "tokens": 100, "loss": 7.0, **more}


class Sides:
    """A bench whose runs are known."""

    def __init__(self, loss: float = 7.0) -> None:
        self.loss = loss

    def central(self, task: Task) -> dict[str, Any]:
        return run(1.0)

    def split(self, task: Task, round_trip_s: float | None = None) -> dict[str, Any]:
        slow = {"client-batch": 1.0, "hierarchical": 0.5, "sequential": 4.0}[task.schedule]
        if task.sites == 1:
            slow = 1.1 if round_trip_s is None else 8.0 / task.in_flight
        return run(slow, joined=7.5, bytes=100 * 4 * 1024, line=2 * 110 * 4096) | {
            "loss": self.loss
        }


def test_ratios_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    on: Any = Sides()
    central = split.against_central(on, [0], False, 3)
    assert central["ratio"] == pytest.approx(1.1) and central["cpu_ratio"] == pytest.approx(1.1)
    turns, joined, replicas = split.schedules(on, [0], False, 1)
    by_turns = (100 * 4 / 3 - 2 * 32) / 4.0
    assert turns["ratio"] == 1.0 and joined["cpu_ratio"] == 4.0
    assert joined["ratio"] == pytest.approx(100 / by_turns)
    assert replicas["ratio"] == pytest.approx(200 / by_turns)
    size = split.size(on, [0], "bf16")
    assert size["floor"] == 4 * 512 * 2 and size["frames"] == pytest.approx(1.0)
    assert size["line"] == pytest.approx(1.1)
    way = split.far(on, [0], False)
    assert [record["ratio"] for record in way] == [1.0, 4.0, 8.0]
    text = split._text([central, turns, joined, replicas, size, *way])
    for shown in (
        "1.10 (CPU 1.10)",
        "at most 1.2",
        "8 sites joined, over by turns",
        "1.0000 (1.1000 on the line)",
    ):
        assert shown in text


def test_sides_that_differ_are_no_result() -> None:
    other: Any = Sides(loss=7.1)
    with pytest.raises(AssertionError, match="the sides differ"):
        split.against_central(other, [0], True, 1)
