"""Sites that die, stall, come late or lie: the others finish, and the memory is freed."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models.split import Parts, cut
from models.split.inbox import Inbox
from models.split.link import FrameLink
from models.split.messages import Kind, Message
from models.split.schedule import Round, client_batch, hierarchical, sequential
from models.split.step import SplitError
from models.train import Trained
from tests.models.split.families import tiny
from tests.models.split.sites import in_threads, linked, middles, settings, stream, train_over

pytestmark = pytest.mark.usefixtures("one_thread")


def model() -> Parts:
    return cut(tiny("llama", tie_word_embeddings=False))


def question(key: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 32) + key, torch.ones(1, 3, dtype=torch.int64)


def honest(round_: Round, site: str, parts: Parts, steps: int = 3) -> Trained:
    with linked(round_, site) as link:
        return train_over(link, copy.deepcopy(parts), stream("llama", 0), steps=steps)


def one_step(link: FrameLink, number: int = 1) -> None:
    link.forward(number, *question()).result(timeout=20)
    link.backward(number, question()[0]).result(timeout=20)
    link.step(number).result(timeout=20)


def kept(round_: Round) -> int:
    return len(round_._trainer.worker)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dies_after", ["forward", "backward", "step"])
def test_a_site_that_dies_stalls_no_one(dies_after: str) -> None:
    parts = model()
    round_ = client_batch([parts.middle], ["ann", "bob", "cid"], settings())
    (ann, cid) = in_threads([partial(honest, round_, n, parts) for n in ("ann", "cid")])
    with linked(round_, "bob") as link:
        if dies_after == "step":
            for key in (1, 2):
                link.forward(key, *question()).result(timeout=20)
                link.backward(key, question()[0]).result(timeout=20)
            link.step(1).result(timeout=20)
        else:
            link.forward(1, *question()).result(timeout=20)
        if dies_after == "backward":
            link.backward(1, question()[0]).result(timeout=20)
    assert ann.result(timeout=20).steps == cid.result(timeout=20).steps == 3
    assert round_.steps == 3 and kept(round_) == 0
    ended_well = dies_after == "step"
    assert round_.dropped == ({} if ended_well else {"bob": "it ended its stream in mid-step"})


def test_a_dead_sites_graph_is_freed() -> None:
    round_ = client_batch([model().middle], ["ann", "bob"], settings(wait_s=0.05))
    with linked(round_, "ann") as ann:
        with linked(round_, "bob") as bob:
            joined = [link.forward(1, *question()) for link in (ann, bob)]
            assert [one.result(timeout=20).shape for one in joined] == [(1, 3, 32)] * 2
            bob.forward(2, *question()).result(timeout=20)
            graphs = round_._trainer.worker._graphs  # type: ignore[attr-defined]
            alone, shared = (
                weakref.ref(graphs[place].behind) for place in (("bob", 2), ("bob", 1))
            )
            assert kept(round_) == 3
        await_(lambda: kept(round_) == 1)
        gc.collect()
        assert alone() is None and shared() is not None
        ann.backward(1, question()[0]).result(timeout=20)
        gc.collect()
        assert shared() is None and kept(round_) == 0


def await_(true: Any) -> None:
    until = time.monotonic() + 10
    while not true() and time.monotonic() < until:
        time.sleep(0.005)
    assert true()


@pytest.mark.parametrize("schedule", [sequential, client_batch, hierarchical])
def test_a_site_that_stalls_is_left_out_with_a_reason(schedule: Any) -> None:
    parts = model()
    round_ = schedule(middles(parts, 1), ["ann", "bob"], settings(stall_s=0.5))
    with linked(round_, "ann") as ann:
        ann.forward(1, *question())
        (bob,) = in_threads([partial(honest, round_, "bob", parts)])
        assert bob.result(timeout=20).steps == 3
        with pytest.raises(SplitError, match="it said nothing for"):
            ann.forward(2, *question()).result(timeout=20)
    assert round_.dropped == {"ann": "it said nothing for 0.5 s"}


def test_a_site_that_never_takes_its_answers_is_left_out() -> None:
    """Its thread hangs in the transport: those who wait for it must see to it themselves."""
    parts = model()
    round_ = client_batch([parts.middle], ["ann", "bob"], settings(stall_s=0.3))

    def asks() -> Iterator[bytes]:
        yield Message(Kind.FORWARD, 1, *question()).encode("fp32")
        threading.Event().wait(20)

    (bob,) = in_threads([partial(honest, round_, "bob", parts)])
    hanging = round_.serve("ann", asks())
    next(hanging)  # the answer is there, and nothing is ever asked again
    assert not bob.done()
    assert bob.result(timeout=20).steps == 3
    assert "ann" in round_.dropped and kept(round_) == 0


@pytest.mark.parametrize("schedule", [sequential, client_batch, hierarchical])
def test_a_site_that_only_scores_does_not_hold_the_others_up(schedule: Any) -> None:
    parts = model()
    first, other = ("ann", "bob") if schedule is sequential else ("bob", "ann")
    round_ = schedule(middles(parts, 1), ["ann", "bob"], settings(wait_s=0.1, stall_s=0.5))
    with linked(round_, first) as talker:
        talker.score(1, *question()).result(timeout=20)
        (honest_one,) = in_threads([partial(honest, round_, other, parts)])
        key, began = 1, time.monotonic()
        while not honest_one.done() and time.monotonic() < began + 10:
            key += 1
            talker.score(key, *question()).result(timeout=20)
            time.sleep(0.02)
        assert honest_one.done() and honest_one.result().steps == 3
        assert time.monotonic() - began > 0.3  # it was waited for, if not for ever
        talker.forward(1, *question()).result(timeout=20)  # nor is it left out
    assert "said nothing" not in round_.dropped.get(first, "")


def test_a_step_ends_for_all_when_one_site_never_ends_its_own() -> None:
    """Neither held-out rows nor more micro-batches keep a step open, nor slow ones for ever."""
    parts = model()
    for wrong, message in (
        ("score", "no held-out rows in a step"),
        ("forward", "at most train.gra"),
    ):
        round_ = client_batch([parts.middle], ["ann", "bob"], settings(wait_s=0.1))
        with linked(round_, "bob") as bob:
            (ann,) = in_threads([partial(honest, round_, "ann", parts)])
            for key in (1, 2):
                bob.forward(key, *question()).result(timeout=20)
            with pytest.raises(SplitError, match=message):
                getattr(bob, wrong)(3, *question()).result(timeout=20)
            assert ann.result(timeout=20).steps == 3
    round_ = client_batch([parts.middle], ["ann", "bob"], settings(wait_s=0.1, stall_s=0.5))
    with linked(round_, "bob") as bob, linked(round_, "ann") as quick:
        for asked in [bob.forward(1, *question()), quick.forward(1, *question())]:
            asked.result(timeout=20)
        quick.backward(1, question()[0]).result(timeout=20)
        stepped = quick.step(1)
        for work in (partial(bob.forward, 2, *question()), partial(bob.backward, 1, question()[0])):
            time.sleep(0.3)  # never silent for long, but slow
            work().result(timeout=20)
        stepped.result(timeout=0.4)
        bob.backward(2, question()[0]).result(timeout=20)
        bob.step(1)
    assert "bob" not in round_.dropped or "said nothing" not in round_.dropped["bob"]


def test_a_late_site_takes_part_from_then_on() -> None:
    parts = model()
    round_ = client_batch([parts.middle], ["ann", "bob"], settings(wait_s=0.2))
    with linked(round_, "ann") as ann:
        one_step(ann)
        assert round_.steps == 1
        with linked(round_, "bob") as bob:
            bob.forward(1, *question()).result(timeout=20)
            ann.forward(2, *question()).result(timeout=20)
            ann.backward(2, question()[0]).result(timeout=20)
            stepped = ann.step(2)
            time.sleep(0.3)  # longer than it waits for passes
            assert not stepped.done()
            bob.backward(1, question()[0]).result(timeout=20)
            bob.step(1).result(timeout=20)
            stepped.result(timeout=20)
    assert round_.steps == 2 and not round_.dropped


def test_a_turn_that_nobody_takes_comes_last() -> None:
    parts = model()
    order: list[str] = []
    round_ = sequential([parts.middle], ["ann", "bob", "cid"], settings(wait_s=0.2))

    def run(site: str) -> None:
        with linked(round_, site) as link:
            one_step(link)
            order.append(site)

    others = in_threads([partial(run, site) for site in ("cid", "bob")])
    await_(lambda: order == ["bob", "cid"])
    run("ann")
    assert [one.result(timeout=20) for one in others] == [None, None]
    assert order == ["bob", "cid", "ann"] and round_.steps == 3 and not round_.dropped


@pytest.mark.parametrize("schedule", [sequential, client_batch])
def test_a_site_that_will_not_come_is_not_waited_for(schedule: Any) -> None:
    parts = model()
    round_ = schedule([parts.middle], ["ann", "bob"], settings(wait_s=600.0))
    round_.absent("ann", "it failed")
    assert honest(round_, "bob", parts).steps == 3
    assert round_.dropped == {"ann": "it failed"}
    with linked(round_, "ann") as link, pytest.raises(SplitError, match="it failed"):
        link.forward(1, *question()).result(timeout=20)


@pytest.mark.parametrize("schedule", [sequential, client_batch, hierarchical])
def test_a_site_that_failed_is_told_so_at_once(schedule: Any) -> None:
    parts = model()
    round_ = schedule(middles(parts, 1), ["ann", "bob"], settings(wait_s=600.0, stall_s=600.0))
    with linked(round_, "ann") as ann:
        ann.score(1, *question()).result(timeout=20)
        (bob,) = in_threads([partial(honest, round_, "bob", parts)])
        time.sleep(0.05)
        assert not bob.done()
        round_.absent("ann", "its reply was an error")
        assert bob.result(timeout=20).steps == 3
        with pytest.raises(SplitError, match="its reply was an error"):
            ann.forward(2, *question()).result(timeout=20)
        ann._reader.join(timeout=5)
        assert not ann._reader.is_alive()
    assert round_.dropped == {"ann": "its reply was an error"}


@pytest.mark.parametrize("schedule", [sequential, client_batch])
def test_turns_of_the_dead_are_passed_on(schedule: Any) -> None:
    parts = model()
    round_ = schedule([parts.middle], ["ann", "bob"], settings())
    broken = threading.Event()

    def breaking(frames: Iterator[bytes]) -> Iterator[bytes]:
        answers = round_.serve("ann", frames)
        yield next(answers)
        broken.wait(20)
        answers.close()  # as the transport does when it cannot send
        raise ConnectionError("the line is cut")

    (bob,) = in_threads([partial(honest, round_, "bob", parts)])
    with FrameLink(breaking, settings().limits) as ann:
        ann.forward(1, *question()).result(timeout=20)
        assert not bob.done()
        broken.set()
        assert bob.result(timeout=20).steps == 3
    assert round_.dropped == {"ann": "its stream broke"} and kept(round_) == 0


@pytest.mark.parametrize("schedule", [sequential, client_batch, hierarchical])
def test_the_end_of_the_round_is_told_to_all(schedule: Any) -> None:
    round_ = schedule(middles(model(), 1), ["ann", "bob"], settings())
    with linked(round_, "ann") as ann, linked(round_, "bob") as bob:
        if schedule is sequential:
            ann.forward(1, *question()).result(timeout=20)
        waiting = bob.forward(1, *question())
        time.sleep(0.05)
        # Replicas that took no step have learnt nothing.
        assert len(round_.finish()) == (schedule is not hierarchical) and not round_.dropped
        for asked in (waiting, ann.forward(2, *question()), bob.forward(2, *question())):
            with pytest.raises(SplitError, match=r"it is over|it ended the stream"):
                asked.result(timeout=20)
    with linked(round_, "ann") as again, pytest.raises(SplitError, match="it is over"):
        again.forward(1, *question()).result(timeout=20)


@pytest.mark.parametrize("what", ["forward_all", "backward_all", "step"])
def test_a_middle_that_fails_tells_those_who_are_in_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = model()
    round_ = client_batch([parts.middle], ["ann", "bob", "cid"], settings(wait_s=0.1))
    trainer = round_._trainer  # type: ignore[attr-defined]

    def fails(*_: Any) -> Any:
        raise MemoryError("no memory left")

    with linked(round_, "ann") as ann, linked(round_, "bob") as bob:
        with monkeypatch.context() as patch:
            patch.setattr(trainer if what == "step" else trainer.worker, what, fails)
            for failed in in_threads([partial(one_step, link) for link in (ann, bob)]):
                with pytest.raises(MemoryError, match="no memory left"):
                    failed.result(timeout=20)
        assert honest(round_, "cid", parts).steps == 3
    assert round_.dropped == dict.fromkeys(("ann", "bob"), "no memory left")


def test_nothing_is_trained_after_the_end() -> None:
    parts = model()
    for schedule in (sequential, client_batch):
        round_ = schedule([parts.middle], ["ann"], settings())
        (learnt,) = round_.finish()
        trainer = round_._trainer  # type: ignore[attr-defined]
        for late in (partial(trainer.step, 1), partial(trainer.alone, len)):
            with pytest.raises(SplitError, match="before the end of the round"):
                late()
        assert round_.steps == 0 and learnt


def test_who_may_open_a_stream() -> None:
    round_ = hierarchical(middles(model(), 2), ["ann", "bob"], settings())
    for site, message in (
        ("eve", "a site of this round, got 'eve'"),
        ("ann", "one stream of 'ann'"),
    ):
        with linked(round_, "ann" if site == "ann" else "bob") as first:
            one_step(first)
            with linked(round_, site) as second, pytest.raises(SplitError, match=message):
                second.forward(1, *question()).result(timeout=20)
            one_step(first, 2)


def test_frames_are_read_one_or_two_ahead_and_no_more() -> None:
    read: list[int] = []

    def frames() -> Iterator[bytes]:
        for number in range(9):
            read.append(number)
            yield bytes([number])

    inbox = Inbox(frames())
    assert inbox.next(5) == b"\0"
    await_(lambda: len(read) == 3)
    time.sleep(0.02)
    assert len(read) == 3
    assert [inbox.next(5) for _ in range(9)] == [*(bytes([n]) for n in range(1, 9)), None]
    stalled = Inbox(iter(threading.Event().wait, None))
    with pytest.raises(TimeoutError):
        stalled.next(0.01)
    stalled.close(SplitError("enough"))
    with pytest.raises(SplitError, match="enough"):
        stalled.next(5)
