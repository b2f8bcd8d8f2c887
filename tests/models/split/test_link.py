"""Both ends of a stream of frames: exact training, failures that stay where they happen."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import settings as within
from hypothesis import strategies as st
from torch import Tensor

from models.payload import Payload
from models.split import cut, twin
from models.split.link import FrameLink, Frames
from models.split.messages import Kind, Message
from models.split.schedule import client_batch, sequential
from models.split.step import SplitError
from models.train import train
from models.wire import WireError
from tests.models.split.families import tiny
from tests.models.split.sites import LIMITS, PLAIN, linked, settings, train_over
from tests.models.split.test_step import NO_DROPOUT, batches

pytestmark = pytest.mark.usefixtures("one_thread")


def test_twenty_steps_over_frames_are_those_of_the_whole() -> None:
    whole = tiny("llama", tie_word_embeddings=False, **NO_DROPOUT)
    parts = cut(copy.deepcopy(whole))
    central = train(
        Payload("full", whole), batches("llama"), PLAIN, steps=20, learning_rate=0.05, seed=1
    )
    round_ = sequential([parts.middle], ["site"], settings(trains="full"))
    with linked(round_, "site") as link:
        split = train_over(link, parts, batches("llama"), steps=20, in_flight=2)
    round_.finish()
    assert split.loss == pytest.approx(central.loss, abs=1e-5)
    assert round_.report()["peak-graphs"] == 2
    floor = 20 * 2 * 27 * 2 * 32 * 4  # each way: steps, micro-batches, tokens, passes, bytes
    assert floor < link.bytes_up < 1.05 * floor and floor < link.bytes_down < 1.05 * floor


def test_scores_are_those_of_the_middle_at_the_start_and_keep_nothing() -> None:
    middle = cut(tiny("llama")).middle
    hidden, mask = question()
    with torch.no_grad():
        before = middle(hidden, mask)
    round_ = sequential([middle], ["site"], settings())
    with linked(round_, "site") as link:
        assert torch.equal(link.score(1, hidden, mask).result(timeout=20), before)
        assert round_.report()["peak-graphs"] == 0
        behind = link.forward(2, hidden, mask).result(timeout=20)
        link.backward(2, behind).result(timeout=20)
        link.step(1).result(timeout=20)
        assert torch.equal(link.score(3, hidden, mask).result(timeout=20), before)
        assert not torch.equal(link.forward(4, hidden, mask).result(timeout=20), before)


def test_a_twin_shares_what_is_frozen_alone() -> None:
    middle = cut(tiny("llama")).middle
    for name, parameter in middle.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    start = twin(middle)
    frozen = {id(p) for p in middle.parameters() if not p.requires_grad}
    assert frozen
    assert {id(p) for p in start.parameters() if not p.requires_grad} == frozen
    assert {id(p) for p in start.parameters()} & {id(p) for p in middle.parameters()} == frozen


def question(key: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 32) + key, torch.ones(1, 3, dtype=torch.int64)


def test_a_stream_that_breaks_fails_what_is_under_way_and_frees_the_graphs() -> None:
    round_ = client_batch([cut(tiny("llama")).middle], ["ann", "bob"], settings(wait_s=0.01))
    worker = round_._trainer.worker  # type: ignore[attr-defined]

    def breaking(frames: Frames) -> Frames:
        answers = round_.serve("ann", frames)
        yield next(answers)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        raise ConnectionError("the line is cut")

    bob = round_.serve("bob", iter([Message(Kind.FORWARD, 1, *question()).encode("fp32")]))
    next(bob)
    with FrameLink(breaking, LIMITS) as link:
        first, second = (link.forward(key, *question()) for key in (1, 2))
        assert first.result(timeout=20).shape == (1, 3, 32)
        with pytest.raises(ConnectionError, match="the line is cut"):
            second.result(timeout=20)
        with pytest.raises(ConnectionError, match="the line is cut"):
            link.forward(3, *question()).result(timeout=20)
    assert len(worker) == 1  # bob's
    bob.close()  # type: ignore[attr-defined]
    assert len(worker) == 0


@pytest.mark.parametrize(
    "answer",
    [
        Message(Kind.HIDDEN, 2, torch.zeros(1, 3, 32)).encode("fp32"),
        Message(Kind.GRADIENT, 1, torch.zeros(1, 3, 32)).encode("fp32"),
    ],
)
def test_an_answer_to_something_else_ends_the_stream(answer: bytes) -> None:
    def lying(frames: Frames) -> Frames:
        next(frames)
        yield answer

    with (
        FrameLink(lying, LIMITS) as link,
        pytest.raises(SplitError, match=r"Expected the answer to 1, got \w+ for \d"),
    ):
        link.forward(1, *question()).result(timeout=20)


def test_a_server_that_ends_the_stream_is_told() -> None:
    def silent(frames: Frames) -> Frames:
        next(frames)
        return
        yield b""

    with (
        FrameLink(silent, LIMITS) as link,
        pytest.raises(SplitError, match="to answer, but it ended the stream"),
    ):
        link.step(1).result(timeout=20)


def answers_to(frame: bytes) -> Iterator[bytes]:
    round_ = sequential([cut(tiny("llama")).middle], ["ann"], settings())
    return round_.serve("ann", iter([frame]))


def test_only_questions_are_answered() -> None:
    with pytest.raises(SplitError, match="Expected a question of 'ann', got HIDDEN"):
        next(answers_to(Message(Kind.HIDDEN, 1, torch.zeros(1, 3, 32)).encode("fp32")))


@within(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(Kind), key=st.integers(0, 2**64 - 1), rows=st.integers(1, 3),
    columns=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_messages_come_back(kind: Kind, key: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stepping = kind in (Kind.STEP, Kind.STEPPED, Kind.OPEN, Kind.OPENED)
    values = None if stepping else torch.randn(rows, columns, 32, generator=generator)
    mask = None
    if kind in (Kind.FORWARD, Kind.SCORE):
        mask = torch.randint(0, 2, (rows, columns), generator=generator)
    found = LIMITS.decode(Message(kind, key, values, mask).encode("fp32"))
    assert (found.kind, found.key) == (kind, key)
    assert (found.values is None) == stepping and (found.mask is None) == (mask is None)
    assert values is None or torch.equal(found.values, values)  # type: ignore[arg-type]
    assert mask is None or torch.equal(found.mask, mask)  # type: ignore[arg-type]


FORWARD = Message(Kind.FORWARD, 1, *question()).encode("fp32")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "at least 17 bytes, got 0"),
        (b"\x09" + FORWARD[1:], "among 1, 2, .*, 8, .* got 9; use the same version"),
        (FORWARD[:9] + b"\xff" * 8 + FORWARD[17:], "a mask of up to 99 tokens"),
        (FORWARD[:9] + b"\0" * 8 + FORWARD[17:], "a mask of up to 99 tokens, got 0 x 0"),
        (FORWARD[:9] + b"\3\0\0\0\1\0\0\0" + FORWARD[17:], r"a mask for \(1, 3\), got \(3, 1\)"),
        (FORWARD[:-1], "Expected 384 bytes of fp32"),
        (b"\2" + FORWARD[1:], "no mask with BACKWARD, got 1 x 3"),
        (b"\3" + b"\0" * 16 + b"x", "nothing more in STEP, got 1 bytes"),
    ],
)
def test_messages_that_lie_are_refused(frame: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        LIMITS.decode(frame)
