"""The two ends of a stream of frames: the site's link to the middle, and the middle behind it.

Neither end knows the transport. A stream that breaks fails what is under way at the site, and frees
its graphs at the server; other sites are not touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from models.split.messages import Kind, Message
from models.split.step import MiddleWorker, SplitError

Frames = Iterator[bytes]


@dataclass(frozen=True)
class Limits:
    """What one message may hold, and how values travel (one of `wire.KINDS`)."""

    most_tokens: int
    hidden_size: int
    precision: str = "bf16"

    def decode(self, frame: bytes) -> Message:
        """The message in a frame; raises WireError."""
        return Message.decode(frame, most_tokens=self.most_tokens, hidden_size=self.hidden_size)


class FrameLink:
    """The site's end: a `Link` over frames; use as a context manager.

    `exchange` sends the frames it is given, as they come, and yields those that come back. Every
    question is answered in its turn; when the stream ends, all that wait get the reason.
    """

    def __init__(self, exchange: Callable[[Frames], Frames], limits: Limits) -> None:
        self._limits = limits
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._waiting: deque[tuple[Kind, int, Future[Tensor]]] = deque()
        self._lock = Lock()
        self._ended: BaseException | None = None
        self.bytes_up = self.bytes_down = 0
        self._reader = Thread(target=self._read, args=(exchange,), name="split", daemon=True)
        self._reader.start()

    def forward(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle, of those before it."""
        return self._ask(Message(Kind.FORWARD, key, hidden, mask.cpu()), Kind.HIDDEN)

    def score(self, key: int, hidden: Tensor, mask: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle as it was when the round began."""
        return self._ask(Message(Kind.SCORE, key, hidden, mask.cpu()), Kind.SCORED)

    def backward(self, key: int, gradient: Tensor) -> Future[Tensor]:
        """The gradient before the middle, of that behind it."""
        return self._ask(Message(Kind.BACKWARD, key, gradient), Kind.GRADIENT)

    def step(self, number: int) -> Future[Tensor]:
        """Done when the middle has taken its optimiser step."""
        return self._ask(Message(Kind.STEP, number), Kind.STEPPED)

    def open(self, model: int) -> Future[Tensor]:
        """Done when the server is ready for a text, having the middle of this model."""
        return self._ask(Message(Kind.OPEN, model), Kind.OPENED)

    def generate(self, position: int, hidden: Tensor) -> Future[Tensor]:
        """Hidden states behind the middle of the tokens from `position` on."""
        return self._ask(Message(Kind.GENERATE, position, hidden), Kind.GENERATED)

    def _ask(self, question: Message, answer: Kind) -> Future[Tensor]:
        frame = question.encode(self._limits.precision)
        future: Future[Tensor] = Future()
        with self._lock:
            if self._ended is not None:
                future.set_exception(self._ended)
                return future
            self._waiting.append((answer, question.key, future))
            self.bytes_up += len(frame)
            self._outgoing.put(frame)
        return future

    def _read(self, exchange: Callable[[Frames], Frames]) -> None:
        try:
            for frame in exchange(iter(self._outgoing.get, None)):
                self.bytes_down += len(frame)
                self._answer(self._limits.decode(frame))
            self._end(SplitError("Expected the server to answer, but it ended the stream."))
        except Exception as error:
            self._end(error)

    def _answer(self, found: Message) -> None:
        with self._lock:
            kind, key, future = self._waiting.popleft() if self._waiting else (None, 0, None)
        if future is None or (found.kind, found.key) != (kind, key):
            if future is not None:
                self._waiting.appendleft((found.kind, key, future))
            raise SplitError(
                f"Expected the answer to {key}, got {found.kind.name} for {found.key}; use the "
                "same version at both ends."
            )
        future.set_result(torch.empty(0) if found.values is None else found.values)

    def _end(self, reason: BaseException) -> None:
        with self._lock:
            self._ended = reason
            waiting = list(self._waiting)
            self._waiting.clear()
        self._outgoing.put(None)
        for _, _, future in waiting:
            future.set_exception(reason)

    def close(self) -> None:
        """End the stream; what is still under way fails."""
        self._outgoing.put(None)
        self._reader.join(timeout=10)

    def __enter__(self) -> FrameLink:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class MiddleService:
    """The server's end: hands what sites ask to the middle, one question at a time.

    `step` is called when a site has sent all micro-batches of an optimiser step.
    """

    def __init__(self, worker: MiddleWorker, step: Callable[[str], None], limits: Limits) -> None:
        self._worker = worker
        self._step = step
        self._limits = limits
        self._lock = Lock()

    def serve(self, site: str, frames: Frames) -> Frames:
        """Answer a site's frames until they end; raises WireError and SplitError for bad ones."""
        try:
            for frame in frames:
                question = self._limits.decode(frame)
                with self._lock:
                    answer = self._answered(site, question)
                yield answer.encode(self._limits.precision)
        finally:
            with self._lock:
                self._worker.forget(site)

    def _answered(self, site: str, question: Message) -> Message:
        key, values = question.key, question.values
        if question.kind is Kind.STEP:
            self._step(site)
            return Message(Kind.STEPPED, key)
        assert values is not None  # decoded so
        if question.kind is Kind.SCORE:
            assert question.mask is not None
            return Message(Kind.SCORED, key, self._worker.score(values, question.mask))
        if question.kind is Kind.FORWARD:
            assert question.mask is not None
            return Message(Kind.HIDDEN, key, self._worker.forward(site, key, values, question.mask))
        if question.kind is Kind.BACKWARD:
            return Message(Kind.GRADIENT, key, self._worker.backward(site, key, values))
        raise SplitError(f"Expected a question of {site!r}, got {question.kind.name}.")
