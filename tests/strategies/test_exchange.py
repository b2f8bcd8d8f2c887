"""An exchange with questions of its own: what its messages cost, and who is told what."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message

from strategies.config import StrategyConfig
from strategies.exchange import Ask, Decoded, Parcel, Plain, PlainIntake, Received, nbytes
from strategies.messages import config_of
from tests.fakes import Answer, Site
from tests.strategies.federation import LAYOUT, Bench, federation, honest

PAYLOAD = 4 * LAYOUT.size
TASK = b"12345"


@pytest.mark.parametrize(
    ("parcel", "size"),
    [
        ({}, 0),
        ({"a": b"123", "b": "fünf", "c": 7, "d": 0.5, "e": True}, 3 + 5 + 8 + 8 + 8),
        ({"a": [b"12", b""], "b": ["x", "yz"], "c": [1, 2, 3], "d": []}, 2 + 3 + 24),
    ],
)
def test_a_parcel_counts_its_values(parcel: Parcel, size: int) -> None:
    assert nbytes(parcel) == size


class Asking(PlainIntake):
    """Asks all sites a question after they have trained."""

    ask: Ask
    answers: Mapping[str, Parcel]

    def close(self) -> Received:
        got = super().close()
        self.answers = self.ask("after", {site: {"thanks": 1} for site in got.rows}, 0.05)
        return got


class Questions(Plain):
    """Updates travel as they are; two questions and a task for each site go with them."""

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> Asking:
        intake = super().open(round_, asked, sent, ask)
        asking = Asking(intake._gate, asked, intake._spool, intake._uniform)
        ready = ask("before", {site: {"number": [1, 2]} for site in asked}, 0.05)
        asking.ask, asking.parcels = ask, {site: {"task": TASK} for site in ready}
        asking.failed = {site: "not ready" for site in asked if site not in ready}
        return asking


def answering(site: str, silent_in: str = "") -> Site:
    """An honest site that answers questions, but for one."""

    def answer(question: Message) -> Iterable[Answer]:
        kind = question.metadata.message_type
        if not kind.startswith("query."):
            told = config_of(question.content, "parcel")
            assert dict(told.items()) == ({"task": TASK} if kind == "train" else {})
            return honest(site)(question)
        if kind.endswith(silent_in or "nothing"):
            return ()
        return [Answer(more={"answer": ConfigRecord({"key": bytes(10), "from": site})})]

    return answer


def exchanged(bench: Bench, tmp_path: Path, **others: Site) -> dict[str, tuple[str, int, int]]:
    """Status, bytes down and bytes up of each site of a round."""
    exchange = Questions(StrategyConfig(), LAYOUT, tmp_path / "spool")
    sites = {name: answering(name) for name in ("ann", "bob", "eve", "zoe")} | others
    _, log = bench.run(federation(**sites), rounds=1, timeout=0.05, exchange=exchange)
    return {o.site: (o.status, o.bytes_down, o.bytes_up) for o in log.rounds[0].sites}


def test_the_messages_of_an_exchange_are_counted(bench: Bench, tmp_path: Path) -> None:
    down, up = PAYLOAD + 16 + len(TASK) + 8, PAYLOAD + 2 * (10 + 3)
    costs = exchanged(
        bench, tmp_path, eve=answering("eve", "before"), zoe=answering("zoe", "after")
    )
    assert costs == {
        "ann": ("ok", down, up),
        "bob": ("ok", down, up),
        "eve": ("failed", 16, 0),  # asked once, told nothing more
        "zoe": ("ok", down, up - 13),
    }


def test_what_an_error_costs_is_its_reason(bench: Bench, tmp_path: Path) -> None:
    def broken(question: Message) -> Iterable[Answer]:
        if question.metadata.message_type == "query.after":
            return [Answer(error=Error(2, "disk is full"))]
        return answering("eve")(question)

    assert exchanged(bench, tmp_path, eve=broken)["eve"] == (
        "ok", PAYLOAD + 16 + len(TASK) + 8, PAYLOAD + 13 + len("disk is full"),
    )  # fmt: skip


def test_an_exchange_hears_at_once_of_a_site_that_cannot(bench: Bench, tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []

    class Hearing(PlainIntake):
        def lost(self, site: str, why: str) -> None:
            heard.append((site, why))

    class Heard(Plain):
        def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> Hearing:
            intake = super().open(round_, asked, sent, ask)
            return Hearing(intake._gate, asked, intake._spool, intake._uniform)

    def broken(question: Message) -> Iterable[Answer]:
        return [Answer(error=Error(2, "disk is full"))]

    sites = {name: honest(name) for name in ("ann", "bob", "zoe")} | {"eve": broken}
    exchange = Heard(StrategyConfig(), LAYOUT, tmp_path / "spool")
    bench.run(federation(**sites), rounds=1, timeout=0.05, exchange=exchange)
    assert heard == [("eve", "disk is full")]


def test_a_round_takes_as_long_as_its_questions_too(bench: Bench, tmp_path: Path) -> None:
    class Slow(Plain):
        def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> PlainIntake:
            time.sleep(0.3)
            return super().open(round_, asked, sent, ask)

    exchange = Slow(StrategyConfig(), LAYOUT, tmp_path / "spool")
    _, log = bench.run(federation(), rounds=1, exchange=exchange)
    assert log.rounds[0].wall_s >= 0.3
