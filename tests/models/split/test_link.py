"""Both ends of a stream of frames: exact training, failures that stay where they happen."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.config import TrainConfig
from models.payload import Payload
from models.split import cut, twin
from models.split.link import FrameLink, Frames, Limits, MiddleService
from models.split.messages import Kind, Message
from models.split.step import MiddleWorker, SiteStep, SplitError
from models.train import Step, optimise, train
from models.wire import WireError
from tests.models.split.families import tiny
from tests.models.split.test_step import NO_DROPOUT, batches

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(27, 32, "fp32")
PLAIN = TrainConfig(optimizer="sgd", max_grad_norm=0.0, grad_accumulation=2, precision="float32")


def test_twenty_steps_over_frames_are_those_of_the_whole() -> None:
    whole = tiny("llama", tie_word_embeddings=False, **NO_DROPOUT)
    parts = cut(copy.deepcopy(whole))
    central = train(
        Payload("full", whole), batches("llama"), PLAIN, steps=20, learning_rate=0.05, seed=1
    )
    middle = torch.optim.SGD(parts.middle.parameters(), lr=0.05)

    def stepped(site: str) -> None:
        middle.step()
        middle.zero_grad()

    worker = MiddleWorker(parts.middle, most=2)
    service = MiddleService(worker, stepped, LIMITS)
    site = Payload("full", nn.ModuleDict({"head": parts.head, "tail": parts.tail}))
    with FrameLink(lambda frames: service.serve("site", frames), LIMITS) as link:
        step = SiteStep(parts.head, parts.tail, link, batches("llama"), accumulation=2, in_flight=2)
        number = 0

        def gradient() -> Step:
            nonlocal number
            number += 1
            found = step()
            link.step(number).result(timeout=20)
            return found

        split = optimise(site, gradient, PLAIN, steps=20, learning_rate=0.05, seed=1)
    assert split.loss == pytest.approx(central.loss, abs=1e-5)
    assert len(worker) == 0
    floor = 20 * 2 * 27 * 2 * 32 * 4  # each way: steps, micro-batches, tokens, passes, bytes
    assert floor < link.bytes_up < 1.05 * floor and floor < link.bytes_down < 1.05 * floor


def test_scores_are_those_of_the_middle_at_the_start_and_keep_nothing() -> None:
    middle = cut(tiny("llama")).middle
    hidden, mask = question()
    with torch.no_grad():
        before = middle(hidden, mask)
    for name, parameter in middle.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    start = twin(middle)
    frozen = {id(p) for p in middle.parameters() if not p.requires_grad}
    assert {id(p) for p in start.parameters() if not p.requires_grad} == frozen
    with torch.no_grad():
        for parameter in middle.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    worker = MiddleWorker(middle, most=1, scorer=start)
    service = MiddleService(worker, lambda site: None, LIMITS)
    with FrameLink(lambda frames: service.serve("site", frames), LIMITS) as link:
        assert torch.equal(link.score(1, hidden, mask).result(timeout=20), before)
        assert len(worker) == 0
        assert not torch.equal(link.forward(2, hidden, mask).result(timeout=20), before)


class Echo:
    """A middle that does nothing, and counts what it keeps."""

    def __init__(self) -> None:
        self.worker = MiddleWorker(cut(tiny("llama")).middle, most=4)
        self.service = MiddleService(self.worker, lambda site: None, LIMITS)


def question(key: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 32) + key, torch.ones(1, 3, dtype=torch.int64)


def test_a_stream_that_breaks_fails_what_is_under_way_and_frees_the_graphs() -> None:
    echo = Echo()

    def breaking(frames: Frames) -> Frames:
        answers = echo.service.serve("ann", frames)
        yield next(answers)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        raise ConnectionError("the line is cut")

    bob = echo.service.serve("bob", iter([Message(Kind.FORWARD, 1, *question()).encode("fp32")]))
    next(bob)
    with FrameLink(breaking, LIMITS) as link:
        first, second = (link.forward(key, *question()) for key in (1, 2))
        assert first.result(timeout=20).shape == (1, 3, 32)
        with pytest.raises(ConnectionError, match="the line is cut"):
            second.result(timeout=20)
        with pytest.raises(ConnectionError, match="the line is cut"):
            link.forward(3, *question()).result(timeout=20)
    assert len(echo.worker) == 1  # bob's
    bob.close()  # type: ignore[attr-defined]
    assert len(echo.worker) == 0


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
    return Echo().service.serve("ann", iter([frame]))


def test_only_questions_are_answered() -> None:
    with pytest.raises(SplitError, match="Expected a question of 'ann', got HIDDEN"):
        next(answers_to(Message(Kind.HIDDEN, 1, torch.zeros(1, 3, 32)).encode("fp32")))


@settings(max_examples=30, deadline=None)
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
        (FORWARD[:9] + b"\xff" * 8 + FORWARD[17:], "a mask of up to 27 tokens"),
        (FORWARD[:9] + b"\0" * 8 + FORWARD[17:], "a mask of up to 27 tokens, got 0 x 0"),
        (FORWARD[:9] + b"\3\0\0\0\1\0\0\0" + FORWARD[17:], r"a mask for \(1, 3\), got \(3, 1\)"),
        (FORWARD[:-1], "Expected 384 bytes of fp32"),
        (b"\2" + FORWARD[1:], "no mask with BACKWARD, got 1 x 3"),
        (b"\3" + b"\0" * 16 + b"x", "nothing more in STEP, got 1 bytes"),
    ],
)
def test_messages_that_lie_are_refused(frame: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        LIMITS.decode(frame)
